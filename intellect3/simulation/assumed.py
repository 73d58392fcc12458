"""A scenario where none is given: what the run file says, rooflines, and stated guesses.

Place in the ring: beside it; `tools.simulate_run` simulates this where it gets no `--scenario`, and
tells every line of it. Servers decode at the roofline of the run's model (`roofline`); the trainer
computes the step's FLOPs at `MFU` of its devices' peak; what is left is assumed, and named so.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from intellect3.models.config import ModelConfig
from intellect3.planning.hardware import Hardware
from intellect3.simulation import roofline, scenario
from intellect3.simulation.settings import RunSettings

MFU = 0.25
"""Of the trainer. Published trainers of such models reached 0.15 to 0.25 (docs/simulator.md)."""
STORE_BYTES_PER_SECOND = 10e9
"""At which weights are written, and read by each server."""
LENGTH_SHARE = 0.2
"""Of the most sampled tokens, that half of the rollouts stay below."""
SIGMA = 0.8
"""Of the logarithm of the lengths."""
MAX_RUNNING = 512
"""Requests that a server decodes at once, where its options do not say."""
SERVE_PER_TRAIN = 3
"""Devices that serve for each that trains: INTELLECT-3 had 44 nodes to 16, our run file 48."""
MEMORY_SHARE = 0.85
"""Of a server's memory, for weights and cache."""
RUNNING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Places of the decode table."""

SOLVED = tuple(tenth / 10 for tenth in range(11))
"""The tasks' difficulties."""
ASSUMED = "assumed"
"""What the notes of guesses begin with; those of the others with `run file` or `roofline`."""

Notes = Mapping[str, str]
"""Where fields of a scenario are from, by `table.field`; what has no note is at its default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
  """What a run file says of its cluster; None where it does not.

  Attributes:
    model: the policy.
    train_dtype: of the trainer's matrix products: a key of `Hardware.matrix_rate`.
    trainer_devices: that the trainer's mesh is of.
    servers: inference servers.
    server_devices: over which each divides the model.
    max_running: requests that each decodes at once.
    memory_share: of a server's memory, for weights and cache.
  """

  model: ModelConfig
  train_dtype: str
  trainer_devices: int
  servers: int | None = None
  server_devices: int | None = None
  max_running: int | None = None
  memory_share: float | None = None

  def __post_init__(self) -> None:
    for field in ("trainer_devices", "servers", "server_devices", "max_running"):
      value = getattr(self, field)
      whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
      if not whole and (value is not None or field == "trainer_devices"):
        raise ValueError(f"{field}: expected an integer of at least 1, got {value!r}")
    share = self.memory_share
    if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
      raise ValueError(f"memory_share: expected a share above 0 and at most 1, got {share!r}")


def make(
  run: RunSettings, said: Said, hardware: Hardware, target: str
) -> tuple[scenario.Scenario, Notes]:
  """A scenario for a run.

  Args:
    run: its settings.
    said: what its file says of the cluster.
    hardware: of every device.
    target: its name, for people.

  Returns:
    The scenario, and where its fields are from.

  Raises:
    ValueError: the model does not fit on the servers' devices.
  """
  of = roofline.sizes(said.model)
  environment = _environment(run)
  drawn = _lengths(environment.lengths)
  seconds_per_token = _train_seconds(of, said, hardware, environment.prompt_tokens, drawn)
  devices = said.server_devices or _server_devices(of, hardware)
  running = said.max_running or MAX_RUNNING
  room = roofline.cache_tokens(
    of, hardware, devices=devices, memory_share=said.memory_share or MEMORY_SHARE
  )
  places = sorted({*(count for count in RUNNING if count < running), running})
  rates = roofline.decode_tokens_per_second(of, hardware, devices=devices, running=places)
  servers = scenario.Servers(
    count=said.servers or -(-SERVE_PER_TRAIN * said.trainer_devices // devices),
    devices=devices,
    max_running=running,
    decode_batch=tuple(map(float, places)),
    decode_tokens_per_second=tuple(round(rate, 1) for rate in rates),
    seconds_per_cached_token=roofline.seconds_per_cached_token(of, hardware, devices=devices),
    cache_tokens=room,
    prefill_tokens_per_second=round(
      roofline.prefill_tokens_per_second(of, hardware, devices=devices)
    ),
  )
  weights = of.parameters * roofline.BYTES
  store = float(f"{weights / STORE_BYTES_PER_SECOND:.3g}")
  node = min(hardware.node, said.trainer_devices)
  trainer = scenario.Trainer(
    seconds_per_token=float(f"{seconds_per_token:.3g}"),
    gather_seconds=float(f"{hardware.host_seconds(weights / node):.3g}"),
    write_seconds=store,
    devices=said.trainer_devices,
  )
  made = scenario.Scenario(
    name=f"assumed: {said.trainer_devices} train, {servers.count} x {devices} serve, {target}",
    servers=servers,
    sync=scenario.Sync(load_seconds=store),
    trainer=trainer,
    environments={scenario.DEFAULT: environment},
  )
  return made, _notes(said, target, weights)


def _environment(run: RunSettings) -> scenario.Environment:
  """Single turns, prompts as long as the run's bounds leave room for."""
  prompt = max(1, run.max_tokens - run.max_new_tokens)
  most = min(run.max_new_tokens, run.max_tokens - prompt)
  median = max(1, round(LENGTH_SHARE * most))
  lengths = scenario.Lengths(median=median, sigma=SIGMA, task_share=0.5, maximum=most)
  return scenario.Environment(lengths=lengths, prompt_tokens=prompt, solved=SOLVED)


def _lengths(lengths: scenario.Lengths, count: int = 2000) -> list[float]:
  """The distribution's quantiles, cut at its bounds."""
  logarithm = statistics.NormalDist(math.log(lengths.median), lengths.sigma)
  quantiles = (math.exp(logarithm.inv_cdf((place + 0.5) / count)) for place in range(count))
  return [min(float(lengths.maximum), max(float(lengths.minimum), one)) for one in quantiles]


def _train_seconds(
  of: roofline.Sizes, said: Said, hardware: Hardware, prompt: int, sampled: list[float]
) -> float:
  """Of a token: `training.flops.train_flops` at `MFU`, over all devices.

  Six FLOPs an active parameter, and twelve a head's width, layer and (query, key) pair: a token of
  a trajectory of n tokens attends to (n + 1) / 2 on average.
  """
  whole = [prompt + one for one in sampled]
  pairs = (statistics.fmean(one * one for one in whole) / statistics.fmean(whole) + 1) / 2
  flops = 6.0 * (of.always + of.expert * of.experts_per_token) + 12.0 * of.heads_dim * pairs
  rate = hardware.matrix_rate.get(said.train_dtype, hardware.matrix_rate["f32"])
  return flops / (rate * MFU * said.trainer_devices)


def _server_devices(of: roofline.Sizes, hardware: Hardware) -> int:
  """The least power of two on which the weights take no more than half of what they may."""
  devices = 1
  while of.parameters * roofline.BYTES > 0.5 * devices * hardware.memory * MEMORY_SHARE:
    devices *= 2
  return devices


def _notes(said: Said, target: str, weights: int) -> Notes:
  stored = f"{ASSUMED}: {weights / 1e9:.3g} GB at {STORE_BYTES_PER_SECOND / 1e9:g} GB/s"
  rooflines = f"roofline of the run's model on {target}: nothing is faster"
  bounds = "max_tokens, max_new_tokens"

  def told(given: object, guess: str) -> str:
    return "run file" if given is not None else f"{ASSUMED}: {guess}"

  return {
    "servers.count": told(
      said.servers, f"{SERVE_PER_TRAIN} devices for each that trains, as INTELLECT-3"
    ),
    "servers.devices": told(
      said.server_devices, "the least power of two with half of it for cache"
    ),
    "servers.max_running": told(said.max_running, "its cache may bind before"),
    "servers.decode_tokens_per_second": rooflines,
    "servers.seconds_per_cached_token": rooflines,
    "servers.cache_tokens": f"roofline, {said.memory_share or MEMORY_SHARE:.0%} of the memory",
    "servers.prefill_tokens_per_second": rooflines,
    "sync.load_seconds": f"{stored}, all servers at once",
    "trainer.seconds_per_token": f"{ASSUMED}: the model's FLOPs at {MFU:.0%} of the peak",
    "trainer.gather_seconds": f"{ASSUMED}: to the memory of one node",
    "trainer.write_seconds": stored,
    "trainer.devices": "run file",
    "environments.default.prompt_tokens": f"{ASSUMED}: what the run leaves for it ({bounds})",
    "environments.default.turns": f"{ASSUMED}: single turns, no tools, rewards at once",
    "environments.default.solved": f"{ASSUMED}: difficulties, all alike",
    "environments.default.error_rate": f"{ASSUMED}: nothing fails",
    "failures.server_mean_seconds": f"{ASSUMED}: no server is lost",
    "failures.worker_mean_seconds": f"{ASSUMED}: no worker is lost",
    "environments.default.lengths.median": f"{ASSUMED}: {LENGTH_SHARE:.0%} of the most sampled",
    "environments.default.lengths.sigma": f"{ASSUMED}: log-normal",
    "environments.default.lengths.task_share": f"{ASSUMED}: half of it is the task's",
    "environments.default.lengths.maximum": f"run file ({bounds})",
  }
