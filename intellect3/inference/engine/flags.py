"""The engine's flags. No jax here: a bad flag or a busy port is told before it is imported."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import NoReturn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the flags say; `parse` has their meaning and defaults."""

  model: str
  port: int
  host: str
  context_length: int | None
  slots: int
  prefill_rows: int
  prefill_chunk: int
  decode_steps: int
  page_size: int
  max_total_tokens: int | None
  tp_size: int
  enable_deterministic_inference: bool
  enable_return_routed_experts: bool
  max_top_logprobs: int
  incremental_streaming_output: bool
  tool_call_parser: str | None
  reasoning_parser: str | None
  chat_template: str | None
  dtype: str | None
  queue_limit: int
  random_seed: int
  weight_version: str
  served_model_name: str | None
  log_level: str
  die_with_parent: bool


def parse(arguments: list[str] | None = None) -> Settings:
  """Parses the command line; a bad one ends the process with code 2 and one line on stderr."""
  parser = _Parser(
    prog="python -m intellect3.inference.engine",
    description="A JAX server that speaks SGLang's HTTP protocol.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, help="directory in Hugging Face's format")
  add("--port", type=_whole(0, 65535), required=True, help="TCP port to listen on")
  add("--host", default="127.0.0.1", help="address to listen on")
  add(
    "--context-length",
    type=_whole(2),
    help="prompt and output together; None: the model's positions",
  )
  add("--slots", type=_whole(1), default=64, help="requests that run at once")
  add("--prefill-rows", type=_whole(1), default=16, help="prompt chunks that a prefill call takes")
  add("--prefill-chunk", type=_whole(1), default=32, help="tokens of each; divides the page size")
  add("--decode-steps", type=_whole(1), default=8, help="most tokens per request of a decode call")
  add("--page-size", type=_whole(1), default=64, help="tokens of a cache page, the unit of sharing")
  add("--max-total-tokens", type=_whole(1), help="of the cache; None: slots times context length")
  add("--tp-size", type=_whole(1), default=1, help="devices that the model is split over")
  add(
    "--enable-deterministic-inference",
    action="store_true",
    help="same seed, same bits, whoever else runs; reserves cache for whole requests",
  )
  add("--enable-return-routed-experts", action="store_true", help="allow return_routed_experts")
  add("--max-top-logprobs", type=_whole(0), default=20, help="most top_logprobs_num of a request")
  add("--incremental-streaming-output", action="store_true", help="streams send what is new")
  add("--tool-call-parser", choices=("glm45",), help="how chat replies are searched for calls")
  add("--reasoning-parser", choices=("glm45",), help="how thinking is told from the answer")
  add("--chat-template", help="jinja file; None: the model directory's own")
  add("--dtype", choices=("float32", "bfloat16"), help="to compute in; None: the model's own")
  add(
    "--queue-limit",
    type=_whole(0),
    default=4096,
    help="waiting requests before new ones get a 503",
  )
  add(
    "--random-seed",
    type=_whole(0),
    default=0,
    help="seeds requests that bring no sampling_seed",
  )
  add("--weight-version", default="default", help="version of the first weights")
  add("--served-model-name", help="as told by /model_info; None: the model directory")
  add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
  add("--die-with-parent", action="store_true", help="end when the starting process does (Linux)")
  settings = Settings(**vars(parser.parse_args(arguments)))
  if settings.page_size % settings.prefill_chunk:
    parser.error(
      f"argument --prefill-chunk: expected a divisor of --page-size ({settings.page_size}), "
      f"got {settings.prefill_chunk}"
    )
  return settings


class _Parser(argparse.ArgumentParser):
  """Without the usage before the error: whoever started the process tells its last line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"engine: cannot start: {message}\n")


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
  """The type of a flag that is a whole number within bounds."""
  bounds = f"a whole number of at least {least}" if most is None else f"{least} to {most}"

  def read(given: str) -> int:
    try:
      value = int(given)
    except ValueError:
      value = least - 1
    if value < least or (most is not None and value > most):
      raise argparse.ArgumentTypeError(f"expected {bounds}, got {given}")
    return value

  return read
