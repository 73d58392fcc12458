"""What `/model_info` and `/server_info` say: SGLang's keys, this engine's values."""

import json
import pathlib
from typing import Any

from intellect3.inference.engine.flags import Settings

_NO_EMBEDDING: dict[str, Any] = {
  "family": "none",
  "task": "none",
  "execution": "none",
  "attention": "none",
  "pooling": "model_defined",
  "normalize": False,
  "postprocessor": "none",
  "tokenizer_special_tokens": "model_default",
  "supports_dimensions": False,
  "supports_token_embeddings": False,
  "supports_multimodal": False,
  "requires_embedding_flag": False,
  "auto_enable_embedding": False,
  "bcg_eligibility": "disabled",
  "safe_disable_kv_cache": False,
  "safe_disable_radix_cache": False,
  "safe_disable_chunked_prefill": False,
  "enabled": False,
  "matryoshka_dimensions": [],
  "bcg": {
    "prefill_backend": "disabled",
    "enabled": False,
    "capture_token_budget": 0,
    "capture_batch_sizes": [],
  },
  "cache": {
    "kv_cache_disabled": False,
    "radix_cache_disabled": False,
    "chunked_prefill_disabled": False,
  },
}
"""What is said of a model that is no embedding model."""


def model_info(settings: Settings) -> dict[str, Any]:
  """The fixed part of `/model_info`; path and version of the weights are put in per request."""
  config = json.loads((pathlib.Path(settings.model) / "config.json").read_text())
  return {
    "model_path": settings.model,
    "served_model_name": settings.served_model_name or settings.model,
    "tokenizer_path": settings.model,
    "is_generation": True,
    "preferred_sampling_params": None,
    "weight_version": settings.weight_version,
    "load_format": "auto",
    "reasoning_parser": settings.reasoning_parser,
    "tool_call_parser": settings.tool_call_parser,
    "disaggregation_mode": "null",
    "has_image_understanding": False,
    "has_audio_understanding": False,
    "model_type": config.get("model_type"),
    "architectures": config.get("architectures"),
    "embedding": _NO_EMBEDDING,
  }


def server_info(
  settings: Settings,
  *,
  context_length: int,
  max_total_tokens: int,
  dtype: str,
  attention: str,
  platform: str,
) -> dict[str, Any]:
  """The fixed part of `/server_info`; `internal_states` is put in per request."""
  return {
    "model_path": settings.model,
    "tokenizer_path": settings.model,
    "served_model_name": settings.served_model_name or settings.model,
    "version": "intellect3",
    "weight_version": settings.weight_version,
    "status": "ready",
    "device": platform,
    "dtype": dtype,
    "tp_size": settings.tp_size,
    "dp_size": 1,
    "ep_size": 1,
    "pp_size": 1,
    "context_length": context_length,
    "max_total_num_tokens": max_total_tokens,
    "max_total_tokens": max_total_tokens,
    "page_size": settings.page_size,
    "max_running_requests": settings.slots,
    "max_queued_requests": settings.queue_limit,
    "max_req_input_len": context_length - 1,
    "chunked_prefill_size": settings.prefill_chunk,
    "prefill_rows": settings.prefill_rows,
    "random_seed": settings.random_seed,
    "schedule_policy": "fcfs",
    "disable_radix_cache": False,
    "attention_backend": attention,
    "sampling_backend": "jax",
    "tool_call_parser": settings.tool_call_parser,
    "reasoning_parser": settings.reasoning_parser,
    "enable_return_routed_experts": settings.enable_return_routed_experts,
    "incremental_streaming_output": settings.incremental_streaming_output,
    "stream_interval": 1,
    "enable_deterministic_inference": settings.enable_deterministic_inference,
    "enable_memory_saver": False,
    "disable_overlap_schedule": True,
    "skip_server_warmup": False,
  }


def models(name: str, *, created: int, context_length: int) -> dict[str, Any]:
  """What `/v1/models` says; `created` in seconds since 1970."""
  card = {
    "id": name,
    "object": "model",
    "created": created,
    "owned_by": "sglang",
    "root": name,
    "parent": None,
    "max_model_len": context_length,
  }
  return {"object": "list", "data": [card]}
