"""Held-out tasks, attempted once each without chance: what an evaluation dispatches."""

from collections.abc import Iterator, Mapping

from intellect3.rollouts import messages
from intellect3.rollouts.scheduler import rollout_seed


def dispatches(sizes: Mapping[str, int], tasks: int, run_seed: int) -> Iterator[messages.Dispatch]:
  """The rollouts of an evaluation, with the ids -1, -2, and so on; each is a group of its own.

  Args:
    sizes: tasks by `environment/split`.
    tasks: of the split `eval` of each environment at most so many, the first ones.
    run_seed: of the run.
  """
  rollout_id = 0
  for key, size in sorted(sizes.items()):
    environment, _, split = key.rpartition("/")
    for index in range(min(tasks, size) if split == "eval" else 0):
      rollout_id -= 1
      yield messages.Dispatch(
        rollout_id=rollout_id,
        group_id=rollout_id,
        sample=0,
        environment=environment,
        split=split,
        index=index,
        seed=rollout_seed(run_seed, environment, index, rollout_id, 0),
        temperature=0.0,
        purpose="eval",
      )
