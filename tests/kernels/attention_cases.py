"""Rows to attend over, and what NumPy says of them in float64: values and gradients."""

from typing import Any

import numpy as np

FLOATS = ("q_BTNH", "k_BSKH", "v_BSKH")


def packed_ids(lengths: list[list[int]], tokens: int) -> tuple[np.ndarray, np.ndarray]:
  """Segment ids and positions [B, tokens] of rows packed with segments of these lengths."""
  segment_ids = np.zeros((len(lengths), tokens), np.int32)
  positions = np.zeros_like(segment_ids)
  for row, segments in enumerate(lengths):
    start = 0
    for number, length in enumerate(segments, 1):
      segment_ids[row, start : start + length] = number
      positions[row, start : start + length] = np.arange(length)
      start += length
    assert start <= tokens
  return segment_ids, positions


def packed(lengths: list[list[int]], tokens: int, *heads: int, seed: int = 0) -> dict[str, Any]:
  """Arguments of `attention` for packed rows; heads are N, K, H."""
  segment_ids, positions = packed_ids(lengths, tokens)
  return {
    **floats(len(lengths), tokens, tokens, *heads, seed=seed),
    "q_positions_BT": positions,
    "kv_positions_BS": positions,
    "q_segment_ids_BT": segment_ids,
    "kv_segment_ids_BS": segment_ids,
  }


def scattered(
  batch: int, queries: int, keys: int, *heads: int, seed: int = 0, segments: int = 3
) -> dict[str, Any]:
  """Arguments of `attention` where segments and positions lie in no order at all."""
  rng = np.random.default_rng(seed + 1)
  return {
    **floats(batch, queries, keys, *heads, seed=seed),
    "q_positions_BT": rng.integers(0, 6, (batch, queries)),
    "kv_positions_BS": rng.integers(0, 6, (batch, keys)),
    "q_segment_ids_BT": rng.integers(0, segments, (batch, queries)),
    "kv_segment_ids_BS": rng.integers(0, segments, (batch, keys)),
  }


def floats(batch, queries, keys, heads, kv_heads, width, *, seed):
  rng = np.random.default_rng(seed)
  shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
  return {
    name: rng.standard_normal((batch, *shape, width)).astype(np.float32)
    for name, shape in zip(FLOATS, shapes, strict=True)
  }


def visible(arguments: dict[str, Any]) -> np.ndarray:
  """bool [B, T, S], token by token."""
  q_segments, kv_segments = arguments["q_segment_ids_BT"], arguments["kv_segment_ids_BS"]
  q_positions, kv_positions = arguments["q_positions_BT"], arguments["kv_positions_BS"]
  seen = np.zeros((*q_segments.shape, kv_segments.shape[1]), bool)
  for row, query, key in np.ndindex(seen.shape):
    seen[row, query, key] = (
      q_segments[row, query] == kv_segments[row, key] != 0
      and kv_positions[row, key] <= q_positions[row, query]
    )
  return seen


def oracle(
  arguments: dict[str, Any], scale: float, dout_BTNH: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
  """The result, and the gradients of q, k and v where a cotangent is given; float64."""
  q, k, v = (np.asarray(arguments[name], np.float64) for name in FLOATS)
  groups = q.shape[2] // k.shape[2]
  seen = visible(arguments)
  out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
  for row, head in np.ndindex(q.shape[0], q.shape[2]):
    k_SH, v_SH = k[row, :, head // groups], v[row, :, head // groups]
    scores = np.where(seen[row], scale * q[row, :, head] @ k_SH.T, -np.inf)
    top = np.max(scores, axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
    out[row, :, head] = weights @ v_SH
    if dout_BTNH is not None:
      dout = np.asarray(dout_BTNH[row, :, head], np.float64)
      dweights = dout @ v_SH.T
      dscores = weights * (dweights - np.sum(weights * dweights, axis=1, keepdims=True))
      dq[row, :, head] = scale * dscores @ k_SH
      dk[row, :, head // groups] += scale * dscores.T @ q[row, :, head]
      dv[row, :, head // groups] += weights.T @ dout
  return (out,) if dout_BTNH is None else (out, dq, dk, dv)
