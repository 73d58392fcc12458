"""Which worker runs or holds which rollout: the orchestrator's book of them.

A rollout runs on its worker, then its tokens are held there until it is batched or forgotten. The
book knows the summaries of what is held, and how many each worker runs.
"""

from collections.abc import Iterable, Mapping

from intellect3.rollouts import messages


class Holdings:
  """Rollouts by worker, from assignment to release.

  Args:
    distrusted: (url, version) of what was distrusted before a resume.
  """

  def __init__(self, distrusted: Iterable[tuple[str, int]] = ()) -> None:
    self._past = list(distrusted)
    self._continued: set[int] = set()
    self._owner: dict[int, str] = {}
    self._held: dict[int, messages.RolloutSummary] = {}
    self._load: dict[str, int] = {}
    self._distrusted: dict[int, set[str]] = {}  # of what runs

  @property
  def load(self) -> Mapping[str, int]:
    """Rollouts that each worker runs."""
    return self._load

  def add_worker(self, name: str) -> None:
    """A worker is there, with nothing."""
    self._load = dict(sorted({**self._load, name: 0}.items()))  # `assign` takes the first

  def remove_worker(self, name: str) -> list[int]:
    """A worker is gone; returns what it ran or held, which is released."""
    lost = [rollout_id for rollout_id, owner in self._owner.items() if owner == name]
    for rollout_id in lost:
      self.release(rollout_id)
    self._load.pop(name, None)
    return lost

  def assign(self, rollout_id: int, *, continued: bool) -> str:
    """Gives a rollout to the worker that runs the fewest, the first of these by name.

    One that is `continued` may have been made, in part, by what was distrusted in the meantime.
    """
    if continued:
      self._continued.add(rollout_id)
    loads = list(self._load.values())
    name = list(self._load)[loads.index(min(loads))]
    self._owner[rollout_id] = name
    self._load[name] += 1
    return name

  def owner(self, rollout_id: int) -> str:
    """The worker that runs or holds a rollout; raises KeyError where none does."""
    return self._owner[rollout_id]

  def runs(self, name: str, rollout_id: int) -> bool:
    """Whether the rollout is this worker's and has not finished."""
    return self._owner.get(rollout_id) == name and rollout_id not in self._held

  def hold(self, summary: messages.RolloutSummary) -> None:
    """A rollout has finished; its worker keeps its tokens."""
    self._load[self._owner[summary.rollout_id]] -= 1
    self._held[summary.rollout_id] = summary

  def release(self, rollout_id: int) -> str | None:
    """The rollout is nobody's any more; returns whose it was."""
    self._distrusted.pop(rollout_id, None)
    self._continued.discard(rollout_id)
    owner = self._owner.pop(rollout_id, None)
    if self._held.pop(rollout_id, None) is None and owner is not None:
      self._load[owner] -= 1
    return owner

  def release_all(self, rollout_ids: Iterable[int]) -> dict[str, list[int]]:
    """Releases rollouts; returns them by the worker whose they were."""
    by_worker: dict[str, list[int]] = {}
    for rollout_id in rollout_ids:
      owner = self.release(rollout_id)
      if owner is not None:
        by_worker.setdefault(owner, []).append(rollout_id)
    return by_worker

  def distrust(self, url: str, version: int) -> None:
    """What runs now may get tokens of a server whose word for its weights is not to be taken.

    A load that broke off may leave a mixture under the version before, and workers learn later than
    the server generates again. Args: version: of that load.
    """
    self._past.append((url, version))
    for rollout_id in self._owner:
      if rollout_id not in self._held:
        self._distrusted.setdefault(rollout_id, set()).add(url)

  def distrusted(self, summary: messages.RolloutSummary) -> list[str]:
    """Servers that made any of it and were distrusted while it ran."""
    servers = self._distrusted.get(summary.rollout_id, set())
    if summary.rollout_id in self._continued:
      # A mixture goes under any version before the one that broke off: syncs may leave some out.
      oldest = summary.oldest_version
      servers = servers | {url for url, version in self._past if oldest <= version}
    return [url for url in summary.servers if url in servers]

  def made_by(self, url: str, version: int) -> list[int]:
    """What is held and was made, in part, by a server with this version or a newer one."""
    return [
      rollout_id
      for rollout_id, summary in self._held.items()
      if url in summary.servers and summary.newest_version >= version
    ]
