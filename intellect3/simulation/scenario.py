"""What a simulated cluster is like: everything that the production code does not decide.

Place: `scenario_file` reads it, `throughput.simulate` runs a run's settings against it. All times
are seconds; a figure is a measurement or an assumption of whoever wrote the scenario, none is
fitted here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT = "default"
MOST_RUNNING = 1_000_000
"""Of a server: there is a table of so many rates."""


def _check(record: Any, table: str, bounds: Mapping[str, tuple[float, float, bool]]) -> None:
  for field, (low, high, whole) in bounds.items():
    value = getattr(record, field)
    kinds = (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
      kind = "an integer" if whole else "a number"
      most = "" if high == math.inf else f" and at most {high:g}"
      raise ValueError(f"{table}.{field}: expected {kind} of at least {low:g}{most}, got {value!r}")


def _numbers(values: Any, field: str, low: float) -> None:
  fits = isinstance(values, Sequence) and all(
    isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and v >= low
    for v in values
  )
  if not fits or not values:
    raise ValueError(f"{field}: expected a list of numbers of at least {low:g}, got {values!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Servers:
  """The inference servers, all alike.

  A decode step of a server that runs b requests with c cached tokens in all takes
  b / tokens_per_second(b) + c * seconds_per_cached_token; each request gets one token of it.

  Attributes:
    count: servers.
    devices: of each; for the report alone.
    max_running: requests that one decodes at once; further ones wait in its queue, first come.
    decode_batch: running requests, ascending from 1, at which the rate is known.
    decode_tokens_per_second: of the whole server there, without what cached tokens cost; linear in
      between, and after the last as there.
    seconds_per_cached_token: that a decode step takes longer for each cached token.
    cache_tokens: that fit in the cache of one server; what would not fit waits, and the newest
      request is put back and computed again when the running ones outgrow it. 0: no bound.
    prefill_tokens_per_second: of prompts; decoding stands still meanwhile.
    latency_seconds: from the client to the server and back, for each segment.
  """

  count: int
  devices: int = 1
  max_running: int
  decode_batch: Sequence[float]
  decode_tokens_per_second: Sequence[float]
  seconds_per_cached_token: float = 0.0
  cache_tokens: int = 0
  prefill_tokens_per_second: float
  latency_seconds: float = 0.0

  def __post_init__(self) -> None:
    _check(
      self,
      "servers",
      {
        "count": (1, math.inf, True),
        "devices": (1, math.inf, True),
        "max_running": (1, MOST_RUNNING, True),
        "cache_tokens": (0, math.inf, True),
        "seconds_per_cached_token": (0, math.inf, False),
        "prefill_tokens_per_second": (1e-9, math.inf, False),
        "latency_seconds": (0, math.inf, False),
      },
    )
    _numbers(self.decode_batch, "servers.decode_batch", 1)
    _numbers(self.decode_tokens_per_second, "servers.decode_tokens_per_second", 1e-9)
    batches = list(self.decode_batch)
    if batches[0] != 1 or batches != sorted(set(batches)):
      raise ValueError(f"servers.decode_batch: expected 1 first, then ascending, got {batches}")
    if len(self.decode_tokens_per_second) != len(batches):
      raise ValueError(
        f"servers.decode_tokens_per_second: expected {len(batches)} numbers, as decode_batch has, "
        f"got {len(self.decode_tokens_per_second)}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sync:
  """Bringing published weights to one server; all servers at once. The mode is the run's.

  With `in_place` running requests keep their cache, with `retract` it is dropped and computed again
  after `resume_seconds`, at the servers' prefill rate.

  Attributes:
    verify_seconds: before any server is asked: fingerprints, reading the manifest.
    pause_seconds: until a server stands still; it still decodes meanwhile.
    load_seconds: it stands still.
    resume_seconds: it stands still.
    canary_seconds: until the version counts as checked; it decodes meanwhile.
    spread_seconds: the servers' loads take up to so much longer, each another share of it.
  """

  verify_seconds: float = 0.0
  pause_seconds: float = 0.0
  load_seconds: float = 0.0
  resume_seconds: float = 0.0
  canary_seconds: float = 0.0
  spread_seconds: float = 0.0

  def __post_init__(self) -> None:
    names = [field.name for field in dataclasses.fields(self)]
    _check(self, "sync", {name: (0, math.inf, False) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
  """The trainer: a step of a batch of N tokens takes fixed_seconds + N * seconds_per_token.

  Attributes:
    fixed_seconds: of each step.
    seconds_per_token: prompt and sampled tokens alike. In a file `plan = "PLAN.json"` (of
      `tools.plan_run --json`) stands for it: predicted_step_seconds / tokens_per_step.
    read_seconds: from the committed manifest to the batch on the devices.
    gather_seconds: the trainer stands still to bring the weights to the host.
    write_seconds: then they are written beside the next step, and the version is out.
    devices: for the report alone.
  """

  fixed_seconds: float = 0.0
  seconds_per_token: float = 0.0
  read_seconds: float = 0.0
  gather_seconds: float = 0.0
  write_seconds: float = 0.0
  devices: int = 1

  def __post_init__(self) -> None:
    seconds = {
      field.name: (0.0, math.inf, False)
      for field in dataclasses.fields(self)
      if field.name != "devices"
    }
    _check(self, "trainer", {**seconds, "devices": (1, math.inf, True)})

  def step_seconds(self, tokens: int) -> float:
    """Seconds that a step on this many tokens takes."""
    return self.fixed_seconds + tokens * self.seconds_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
  """Sampled tokens of a rollout, all turns together.

  Attributes:
    median: of the log-normal distribution.
    sigma: of its logarithm.
    task_share: share of the logarithm's variance that all rollouts of a task have in common.
    minimum: shorter ones are so long.
    maximum: longer ones are cut there and count as truncated; the run's `max_tokens` cuts too.
    empirical: lengths to draw from instead, each as likely. In a file `rollout_log = "DIR"` (a
      run's `rollouts`) stands for them.
  """

  median: float = 1.0
  sigma: float = 0.0
  task_share: float = 0.0
  minimum: int = 1
  maximum: int = 2**31 - 1
  empirical: Sequence[int] = ()

  def __post_init__(self) -> None:
    _check(
      self,
      "lengths",
      {
        "median": (1, math.inf, False),
        "sigma": (0, math.inf, False),
        "task_share": (0, 1, False),
        "minimum": (1, math.inf, True),
        "maximum": (1, math.inf, True),
      },
    )
    if self.maximum < self.minimum:
      raise ValueError(
        f"lengths.maximum: expected at least minimum ({self.minimum}), got {self.maximum}"
      )
    if self.empirical:
      _numbers(self.empirical, "lengths.empirical", 1)
      if any(length != int(length) for length in self.empirical):
        raise ValueError(f"lengths.empirical: expected whole numbers, got {self.empirical!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
  """What attempts of one environment are like.

  Attributes:
    lengths: of the sampled tokens, spread evenly over the turns.
    prompt_tokens: of the first turn; the members of a group share them.
    turns: of a rollout.
    turn_tokens: that come in before each later turn.
    tool_seconds: mean, exponentially distributed, before each later turn.
    reward_seconds: from the last token to the reward.
    error_rate: share of the rollouts that fail, at their end.
    solved: the tasks' difficulties, equally likely: how often an attempt at one gets reward 1
      rather than 0.
    tasks: training tasks; 0 for as many as the run's environment has.
  """

  lengths: Lengths
  prompt_tokens: int = 1
  turns: int = 1
  turn_tokens: int = 0
  tool_seconds: float = 0.0
  reward_seconds: float = 0.0
  error_rate: float = 0.0
  solved: Sequence[float] = (0.5,)
  tasks: int = 0

  def __post_init__(self) -> None:
    _check(
      self,
      "environments",
      {
        "prompt_tokens": (1, math.inf, True),
        "turns": (1, math.inf, True),
        "turn_tokens": (0, math.inf, True),
        "tool_seconds": (0, math.inf, False),
        "reward_seconds": (0, math.inf, False),
        "error_rate": (0, 1, False),
        "tasks": (0, math.inf, True),
      },
    )
    _numbers(self.solved, "environments.solved", 0)
    if max(self.solved) > 1:
      raise ValueError(f"environments.solved: expected shares of at most 1, got {self.solved!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clients:
  """The rollout workers as senders of requests and messages.

  Attributes:
    shared_balance: whether all workers see each other's requests at once, through one balancer of
      as many slots as theirs together; otherwise each has its own and hears of the others at the
      run's `server_poll_seconds`, as in production, which takes longer to simulate.
    message_seconds: between orchestrator and worker, each way.
    write_seconds_per_token: that a worker takes for its shard of a batch.
  """

  shared_balance: bool = True
  message_seconds: float = 0.0
  write_seconds_per_token: float = 0.0

  def __post_init__(self) -> None:
    if not isinstance(self.shared_balance, bool):
      raise ValueError(f"clients.shared_balance: expected a bool, got {self.shared_balance!r}")
    _check(
      self,
      "clients",
      {
        "message_seconds": (0, math.inf, False),
        "write_seconds_per_token": (0, math.inf, False),
      },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failures:
  """What breaks down, each on its own, and comes back.

  A server that is lost takes a segment of each of its requests with it; clients ask another one. It
  comes back without weights and is brought them. Of a worker that is lost another one goes on with
  what its journal has.

  Attributes:
    server_mean_seconds: between the return of a server and its next loss, on average,
      exponentially distributed; 0: none is ever lost.
    server_repair_seconds: until it is back.
    worker_mean_seconds, worker_repair_seconds: likewise of a worker.
  """

  server_mean_seconds: float = 0.0
  server_repair_seconds: float = 300.0
  worker_mean_seconds: float = 0.0
  worker_repair_seconds: float = 300.0

  def __post_init__(self) -> None:
    names = [field.name for field in dataclasses.fields(self)]
    _check(self, "failures", {name: (0, math.inf, False) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
  """A cluster and what is attempted on it.

  Attributes:
    name: for people.
    servers, sync, trainer, clients, failures: see there.
    environments: by the run's names of them; `default` for those not named.
    seed: of everything that the scenario draws; the run's own seed is another.
  """

  name: str
  servers: Servers
  trainer: Trainer
  environments: Mapping[str, Environment]
  sync: Sync = dataclasses.field(default_factory=Sync)
  clients: Clients = dataclasses.field(default_factory=Clients)
  failures: Failures = dataclasses.field(default_factory=Failures)
  seed: int = 0

  def __post_init__(self) -> None:
    if not isinstance(self.name, str) or not self.name:
      raise ValueError(f"name: expected a name, got {self.name!r}")
    if not self.environments:
      raise ValueError("environments: expected at least `default`, got none")
    _check(self, "scenario", {"seed": (0, 2**63 - 1, True)})

  def environment(self, name: str) -> Environment:
    """What attempts of the run's environment of this name are like; ValueError where not told."""
    found = self.environments.get(name, self.environments.get(DEFAULT))
    if found is None:
      raise ValueError(
        f"environments: expected {name} or {DEFAULT}, got {sorted(self.environments)}"
      )
    return found
