"""The canary prompt, on which every server is compared with the trainer after every sync."""

import numpy as np

from intellect3.rl.roles import Shared


def canary_ids(shared: Shared, length: int) -> np.ndarray:
  """int32[length]: half of it tasks as the policy sees them, half random ids of the vocabulary.

  Real prompts reach the experts and embeddings that the run depends on; random ids reach others.
  """
  ids: list[int] = []
  index = 0
  while len(ids) < length // 2:
    for environment in shared.environments.values():
      ids += shared.renderer.render(environment.task("train", index).prompt)
    index += 1
  rng = np.random.default_rng(shared.seed)
  random_ids = rng.integers(0, shared.renderer.vocab_size, length)
  return np.concatenate([ids[: length // 2], random_ids])[:length].astype(np.int32)
