"""Packed batches for the tests of the losses, and the ways to lay the same trajectories out.

Place: `tests/losses`. Trajectories differ in how far they are off policy, from not at all to
ratios of e^10 and e^-14, so that every bound is met from both sides; prompts and tool answers are
not trained on, and one trajectory is trained on nowhere.
"""

import numpy as np

ROWS, LENGTH = 4, 24
SPREADS = (0.0, 2e-4, 0.1, 0.5, 1.5)
FLOATS = ("logprobs", "inference_logprobs", "old_logprobs", "ref_logprobs", "advantages")
WEIGHTS = ("rl_weights", "ce_weights", "ref_kl_weights")


def batch(seed, rows=ROWS, length=LENGTH, dtype=np.float32, on_policy=False, packed=(4, 8)):
  """Arrays [rows, length] by name; `token` numbers the tokens from 1, and is 0 in padding.

  `packed`: the most trajectories that a row holds, and their largest size.
  """
  most, largest = packed
  rng = np.random.default_rng(seed)
  shape = (rows, length)
  segment_ids = np.zeros(shape, np.int32)
  loss_mask = np.zeros(shape, bool)
  log_ratios = np.zeros(shape)
  old_ratios = np.zeros(shape)
  for row in range(rows):
    start = 0
    for segment in rng.permutation(np.arange(1, length + 1))[:most]:
      size = int(rng.integers(1, largest + 1))
      if start + size > length - 1:
        break
      mine = np.s_[row, start : start + size]
      segment_ids[mine] = segment
      loss_mask[mine] = rng.random(size) < rng.choice([0.0, 0.6, 0.9, 1.0], p=[0.1, 0.3, 0.3, 0.3])
      spread = SPREADS[rng.integers(len(SPREADS))]
      log_ratios[mine] = spread * rng.standard_normal(size)
      if spread > 1:
        log_ratios[mine] += rng.choice([0.0, 10.0, -14.0], size, p=[0.85, 0.1, 0.05])
      old_ratios[mine] = spread * rng.standard_normal(size) * rng.choice([0.0, 0.3, 1.0])
      start += size
  logprobs = -rng.exponential(1.0, shape)
  advantages = rng.standard_normal(shape) * rng.choice([0.0, 1.0, 3.0], shape, p=[0.1, 0.6, 0.3])
  made = {
    "logprobs": logprobs,
    "inference_logprobs": logprobs - (0.0 if on_policy else log_ratios),
    "old_logprobs": logprobs - (0.0 if on_policy else old_ratios),
    "ref_logprobs": logprobs + 0.5 * rng.standard_normal(shape),
    "advantages": advantages,
    **{name: rng.choice([0.0, 0.25, 1.0, 2.0], shape) for name in WEIGHTS},
  }
  made = {name: value.astype(np.float32).astype(dtype) for name, value in made.items()}
  if on_policy:  # Exactly: also after the rounding.
    made["inference_logprobs"] = made["old_logprobs"] = made["logprobs"]
  token = np.where(segment_ids != 0, np.arange(1, segment_ids.size + 1).reshape(shape), 0)
  return {**made, "loss_mask": loss_mask, "segment_ids": segment_ids, "token": token}


def trajectories(arrays):
  """(row, positions) of each trajectory, in order of its row and first token."""
  found = []
  for row, ids in enumerate(arrays["segment_ids"]):
    kinds, first = np.unique(ids, return_index=True)
    for segment in kinds[np.argsort(first)]:
      if segment != 0:
        found.append((row, np.flatnonzero(ids == segment)))
  return found


def repacked(arrays, rng, rows=ROWS, length=LENGTH):
  """The same trajectories in other rows, at scattered places, under other ids; padding is junk."""
  rows_before = trajectories(arrays)
  while True:
    free = [list(rng.permutation(length)) for _ in range(rows)]
    names = [list(rng.permutation(np.arange(1, length + 1))) for _ in range(rows)]
    made = {
      name: np.asarray(7 * rng.standard_normal((rows, length)), array.dtype)
      for name, array in arrays.items()
    }
    made["loss_mask"] = np.zeros((rows, length), bool)
    made["segment_ids"], made["token"] = (np.zeros((rows, length), int) for _ in range(2))
    made["segment_ids"] = made["segment_ids"].astype(np.int32)
    placed = 0
    for index in rng.permutation(len(rows_before)):
      row, positions = rows_before[index]
      roomy = [new for new in range(rows) if len(free[new]) >= len(positions) and names[new]]
      if not roomy:
        break
      new = roomy[rng.integers(len(roomy))]
      places, free[new] = free[new][: len(positions)], free[new][len(positions) :]
      for name, array in arrays.items():
        made[name][new, places] = array[row, positions]
      made["segment_ids"][new, places] = names[new].pop()
      placed += 1
    if placed == len(rows_before):
      return made


def rows_of(arrays, keep):
  """The batch with all rows but those of `keep` empty: a micro-batch of the same shape."""
  keep = np.isin(np.arange(arrays["segment_ids"].shape[0]), keep)[:, None]
  return {name: np.where(keep, array, np.zeros((), array.dtype)) for name, array in arrays.items()}


def by_token(values, arrays, count):
  """`values` [B, T] as a vector over the tokens' numbers, so that layouts can be compared."""
  out = np.zeros(count + 1)
  held = arrays["token"] != 0
  out[arrays["token"][held]] = np.asarray(values, np.float64)[held]
  return out[1:]
