"""The part of the second book that is about tasks: which come next, and what held-out ones scored.

Difficulty pools are kept by the rewards that pass by: a task leaves for a pool, or returns from it,
when a batch is committed, in the order of the dispatches.
"""

import collections
import copy
import random

SIZES = {"coin/train": 11, "word/train": 5, "coin/eval": 2, "word/eval": 4}
SEED = 0

POOLS = {"none": None, "mix": (0.2, 0.5), "leave": (0.0, 0.0), "solved": (0.0, 0.3)}
"""Shares of dispatches that are drawn from the easy and from the hard pool."""


class Broken(AssertionError):
  """The orchestrator has departed from a rule."""


def expect(holds, what):
  if not holds:
    raise Broken(what)


class Tasks:
  """The training tasks."""

  def __init__(self, pools):
    self._shares = POOLS[pools]
    self._sizes = {
      key.removesuffix("/train"): size for key, size in SIZES.items() if key.endswith("/train")
    }
    self.pool = {}  # (environment, index) -> easy or hard
    self._ever = set()  # what was once in a pool
    self._draws = collections.Counter()  # of normal tasks
    self.moves = {}  # group -> environment, index, mean reward; entered with the next commit

  def copy(self):
    """One that changes alone."""
    other = copy.copy(self)
    other.pool, other.moves = dict(self.pool), dict(self.moves)
    other._ever, other._draws = set(self._ever), collections.Counter(self._draws)
    return other

  def _of(self, environment, pool):
    tasks = [(environment, index) for index in range(self._sizes[environment])]
    return [task for task in tasks if self.pool.get(task, "normal") == pool]

  def exhausted(self):
    """Whether some environment has nothing left that may be drawn."""
    if self._shares is None:
      return False
    names = [
      "normal",
      *(n for n, share in zip(("easy", "hard"), self._shares, strict=True) if share),
    ]
    return any(not any(self._of(env, name) for name in names) for env in self._sizes)

  def drawn(self, group, environment, index):
    """A new group attempts this task."""
    task = environment, index
    due = self._due(group, environment)
    is_in = self.pool.get(task, "normal")
    expect(is_in in due, f"group {group} attempts {task}, which is {is_in}; due is one of {due}")
    if is_in == "normal":
      self._draws[task] += 1
      often = {t: self._draws[t] for t in self._of(environment, "normal") if t not in self._ever}
      late = [t for t, count in often.items() if count + 1 < self._draws[task]]
      expect(not late, f"group {group} attempts {task} again, before {late} had their turn")

  def _due(self, group, environment):
    """The pools that the draw may be from: by the group's number and the run's seed alone."""
    if self._shares is None:
      return ("normal",)
    rng = random.Random(f"{SEED}/task/{group}")
    rng.random()  # of the environment
    share, (easy, hard) = rng.random(), self._shares
    wanted = "easy" if share < easy else "hard" if share < easy + hard else "normal"
    if self._of(environment, wanted):
      return (wanted,)
    if self._of(environment, "normal"):
      return ("normal",)
    return tuple(n for n, given in (("easy", easy), ("hard", hard)) if given)

  def move(self, told):
    """A batch is committed: what was scored since the last one moves."""
    for _, (environment, index, reward) in sorted(self.moves.items()):
      task = environment, index
      if self._shares is not None and reward in (0.0, 1.0):
        self.pool[task] = "easy" if reward else "hard"
        self._ever.add(task)
      else:
        self.pool.pop(task, None)
    self.moves = {}
    says = {(env, index): pool for env, rows in told.items() for index, pool in rows}
    expect(says == self.pool, f"the pools are {says}, due {self.pool}")


class Exams:
  """Evaluations of one life of the orchestrator."""

  def __init__(self, tasks):
    self._tasks = {
      (key.removesuffix("/eval"), index)
      for key, size in SIZES.items()
      if key.endswith("/eval")
      for index in range(min(tasks, size))
    }
    self._open = {}  # id -> task, worker
    self._adrift = set()  # what was lost with a worker
    self._scores = {}  # environment, index -> reward, or None
    self.due = []  # versions to be evaluated
    self.told = []

  def started(self, dispatch, worker):
    """A held-out task is attempted."""
    task = dispatch.environment, dispatch.index
    held = dispatch.split == "eval" and dispatch.temperature == 0.0 and dispatch.rollout_id < 0
    expect(held, f"no evaluation is due, or another one: {dispatch}")
    again = task in self._adrift
    due = task in self._tasks and (again or task not in self._scores)
    expect(due, f"{task} is evaluated twice, or is not to be")
    self._adrift.discard(task)
    self._open[dispatch.rollout_id] = task, worker
    self._scores[task] = None

  def environment(self, key):
    """Of an open attempt."""
    return self._open[key][0][0]

  def left(self, worker):
    """A worker is gone: another one attempts what it did."""
    gone = [key for key, (_, runs_on) in self._open.items() if runs_on == worker]
    self._adrift |= {self._open.pop(key)[0] for key in gone}

  def finished(self, worker, summary):
    """A result has arrived."""
    task, runs_on = self._open.get(summary.rollout_id, (None, None))
    if runs_on == worker:
      del self._open[summary.rollout_id]
      self._scores[task] = summary.reward

  def reported(self, version, row, served):
    """The scores of a version are told."""
    expect(version == served, f"v{version} is evaluated on servers with v{served}")
    all_done = not self._open and not self._adrift and self._scores.keys() == self._tasks
    expect(all_done, "an evaluation told half done")
    by_name = collections.defaultdict(list)
    for (environment, _), reward in sorted(self._scores.items()):
      if reward is not None:
        by_name[f"reward/{environment}"].append(reward)
    every = [reward for rewards in by_name.values() for reward in rewards]
    due = {"tasks": len(self._tasks), "errored": len(self._tasks) - len(every)}
    due |= {name: sum(rewards) / len(rewards) for name, rewards in by_name.items()}
    due |= {"reward": sum(every) / len(every)} if every else {}
    expect(dict(row) == due, f"the evaluation of v{version} says {dict(row)}, due {due}")
    self.told.append(version)
    self._scores = {}
