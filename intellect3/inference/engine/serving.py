"""What the routes need to know of the served model besides its engine."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from intellect3.inference.engine import info, text
from intellect3.inference.engine.flags import Settings
from intellect3.inference.engine.request import Limits
from intellect3.inference.engine.text import Text
from intellect3.models.config import ModelConfig
from intellect3.rendering import chat_template
from intellect3.rendering.chat_template import ChatTemplate

PARSERS = ("glm45",)
"""What `--tool-call-parser` and `--reasoning-parser` may name."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Of chats: taken from the model's `generation_config.json`, as SGLang does."""


@dataclasses.dataclass(frozen=True)
class Serving:
  """The served model as clients meet it.

  Attributes:
    limits: of requests.
    name: of the model, as `/v1/models` tells it.
    text: its tokenizer; None where the directory has none.
    chat: its chat template; None where the directory has none.
    chat_defaults: sampling parameters of chats that give none.
    tool_call_parser: format in which the model calls tools; None leaves calls in the text.
    reasoning_parser: format of its reasoning; None leaves it in the text.
    incremental: whether streams tell only what is new.
    num_dense_layers: its first layers, without experts.
    prepare: path of a model directory -> weights on the device; raises ValueError; may be slow.
    prepare_tensors: tensors by their names in checkpoints -> the same; those that are not there
      stay as they are served.
    model_info: fixed part of `/model_info`.
    server_info: fixed part of `/server_info`.
  """

  limits: Limits
  name: str
  text: Text | None
  chat: ChatTemplate | None
  chat_defaults: Mapping[str, float]
  tool_call_parser: str | None
  reasoning_parser: str | None
  incremental: bool
  num_dense_layers: int
  prepare: Callable[[str], Any]
  prepare_tensors: Callable[[dict[str, np.ndarray]], Any]
  model_info: dict[str, Any]
  server_info: dict[str, Any]


def make_serving(
  settings: Settings,
  config: ModelConfig,
  *,
  context_length: int,
  max_total_tokens: int,
  max_stop_ids: int,
  platform: str,
  prepare: Callable[[str], Any],
  prepare_tensors: Callable[[dict[str, np.ndarray]], Any],
) -> Serving:
  """Reads what the model directory says about text, chats and sampling.

  Args:
    settings: the flags.
    config: of the model.
    context_length: tokens of prompt and output together.
    max_total_tokens: that the cache takes.
    max_stop_ids: of a request, besides the model's own, that can be banned for a while.
    platform: of the devices.
    prepare, prepare_tensors: as Serving's.

  Raises:
    ValueError: a file of the directory or a flag is wrong; the message names which.
  """
  for flag in ("tool_call_parser", "reasoning_parser"):
    if getattr(settings, flag) not in (None, *PARSERS):
      raise ValueError(f"{flag}: expected one of {PARSERS}, got {getattr(settings, flag)!r}")
  return Serving(
    limits=Limits(
      vocab_size=config.vocab_size,
      context_length=context_length,
      max_top_logprobs=settings.max_top_logprobs,
      routed_experts=settings.enable_return_routed_experts,
      max_stop_ids=max_stop_ids,
      slots=settings.slots,
    ),
    name=settings.served_model_name or settings.model,
    text=text.load(settings.model, config.vocab_size),
    chat=chat_template.load(settings.model, settings.chat_template),
    chat_defaults=_chat_defaults(settings.model),
    tool_call_parser=settings.tool_call_parser,
    reasoning_parser=settings.reasoning_parser,
    incremental=settings.incremental_streaming_output,
    num_dense_layers=config.num_dense_layers,
    prepare=prepare,
    prepare_tensors=prepare_tensors,
    model_info=info.model_info(settings),
    server_info=info.server_info(
      settings,
      context_length=context_length,
      max_total_tokens=max_total_tokens,
      dtype=str(config.dtype),
      attention=config.attention,
      platform=platform,
    ),
  )


def _chat_defaults(directory: str) -> dict[str, float]:
  path = pathlib.Path(directory) / "generation_config.json"
  config = json.loads(path.read_text()) if path.is_file() else {}
  return {name: config[name] for name in SAMPLING_DEFAULTS if config.get(name) is not None}
