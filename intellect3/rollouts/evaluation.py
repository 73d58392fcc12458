"""Evaluation inside a run: held-out tasks, greedy, on the servers' present version.

Its rollouts go through the same workers and servers as all others; they are scored and forgotten,
and never enter the accounting.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from intellect3.rollouts import messages, reports
from intellect3.rollouts.groups import rollout_seed


class HeldOut:
  """The evaluation that runs, if any. Belongs to one event loop.

  Args:
    tasks: of the split `eval` of each environment at most so many, the first ones; 0 for none.
    run_seed: of the run.
  """

  def __init__(self, tasks: int, run_seed: int) -> None:
    self.tasks = tasks
    self._run_seed = run_seed
    self._dispatches: dict[int, messages.Dispatch] = {}
    self._done: dict[int, asyncio.Future[messages.RolloutSummary]] = {}

  def begin(self, sizes: Mapping[str, int]) -> list[messages.Dispatch]:
    """The rollouts of an evaluation. Args: sizes: tasks by `environment/split`."""
    loop = asyncio.get_running_loop()
    self._dispatches = {one.rollout_id: one for one in self._draw(sizes)}
    self._done = {rollout_id: loop.create_future() for rollout_id in self._dispatches}
    return list(self._dispatches.values())

  def _draw(self, sizes: Mapping[str, int]) -> Iterator[messages.Dispatch]:
    """The ids are -1, -2, and so on; each is a group of its own."""
    rollout_id = 0
    for key, size in sorted(sizes.items()):
      environment, _, split = key.rpartition("/")
      for index in range(min(self.tasks, size) if split == "eval" else 0):
        rollout_id -= 1
        yield messages.Dispatch(
          rollout_id=rollout_id,
          group_id=rollout_id,
          sample=0,
          environment=environment,
          split=split,
          index=index,
          seed=rollout_seed(self._run_seed, environment, index, rollout_id, 0),
          temperature=0.0,
          purpose="eval",
        )

  def of(self, rollout_ids: Iterable[int]) -> list[messages.Dispatch]:
    """Those of these that are evaluation rollouts, to be started again."""
    return [self._dispatches[key] for key in rollout_ids if key in self._dispatches]

  def finished(self, summary: messages.RolloutSummary) -> None:
    """One of them has ended."""
    self._done[summary.rollout_id].set_result(summary)

  async def scores(self) -> dict[str, float]:
    """Waits for all of them; returns the scores."""
    return dict(reports.evaluation(await asyncio.gather(*self._done.values())))
