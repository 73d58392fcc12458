"""The same run on many clusters, or with many settings: what changes, and what becomes of it.

Place in the ring: beside it; `tools.simulate_sweep` runs these and draws them with `plots`. Every
variant draws the same attempts (`attempts`), so that differences are not those of the draws.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intellect3.rollouts import ports
from intellect3.simulation import clock, throughput
from intellect3.simulation import scenario as scenarios
from intellect3.simulation import settings as settings_lib

WARM_UP_FACTOR = 4
"""Times the bound on staleness, that a run takes to settle."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """One place of a sweep.

  Attributes:
    label: what is changed, to what; unique in its sweep.
    x: where it is drawn.
    series: the line that it belongs to.
    run: the run's settings.
    scenario: the cluster.
  """

  label: str
  x: float
  series: str
  run: settings_lib.RunSettings
  scenario: scenarios.Scenario


def splits(
  run: settings_lib.RunSettings,
  given: scenarios.Scenario,
  trainer_nodes: Sequence[int],
  *,
  nodes: int,
) -> list[Variant]:
  """The same nodes divided otherwise; a server takes as many nodes as it does in the scenario.

  The trainer's time for a token falls as its nodes grow; that more of them also wait longer for
  each other is left out.

  Args:
    run: the run.
    given: with `trainer.devices` and `servers.devices` of it.
    trainer_nodes: of the trainer, for each variant.
    nodes: all together, each of as many devices as a server has.

  Raises:
    ValueError: nothing is left for the servers.
  """
  per_node = given.servers.devices
  variants = []
  for count in trainer_nodes:
    if not 0 < count < nodes:
      raise ValueError(f"trainer_nodes: expected from 1 to {nodes - 1}, got {count}")
    slower = given.trainer.devices / (count * per_node)
    changed = dataclasses.replace(
      given,
      servers=dataclasses.replace(given.servers, count=nodes - count),
      trainer=dataclasses.replace(
        given.trainer,
        seconds_per_token=given.trainer.seconds_per_token * slower,
        devices=count * per_node,
      ),
    )
    label = f"{count} : {nodes - count}"
    variants.append(Variant(label, count, "trainer nodes", run, changed))
  return variants


def in_flight(
  run: settings_lib.RunSettings, given: scenarios.Scenario, counts: Sequence[int]
) -> list[Variant]:
  """Other numbers of rollouts running at once; the clients' slots grow with them."""
  variants = []
  for count in counts:
    slots = max(run.max_concurrency, -(-count // max(1, run.num_workers)))
    changed = dataclasses.replace(
      run,
      scheduler=dataclasses.replace(run.scheduler, max_rollouts_in_flight=count),
      max_concurrency=slots,
    )
    variants.append(Variant(f"{count:,} in flight", count, "rollouts in flight", changed, given))
  return variants


def staleness(
  run: settings_lib.RunSettings,
  given: scenarios.Scenario,
  bounds: Sequence[int],
  rules: Sequence[str] = ("drop", "mask"),
) -> list[Variant]:
  """Other bounds on staleness under each rule."""
  return [
    Variant(
      f"{rule}, at most {bound}",
      bound,
      rule,
      dataclasses.replace(
        run,
        scheduler=dataclasses.replace(
          run.scheduler, max_off_policy_steps=bound, staleness_rule=rule
        ),
      ),
      given,
    )
    for rule in rules
    for bound in bounds
  ]


def segments(
  run: settings_lib.RunSettings,
  given: scenarios.Scenario,
  tokens: Sequence[int],
  modes: Sequence[str] = ("in_place", "retract"),
) -> list[Variant]:
  """Other lengths of what is asked for at once, under each mode of the weight sync."""
  return [
    Variant(
      f"{mode}, segments of {count:,}",
      count,
      mode,
      dataclasses.replace(run, segment_tokens=count, sync_mode=mode),
      given,
    )
    for mode in modes
    for count in tokens
  ]


def lengths(
  run: settings_lib.RunSettings,
  given: scenarios.Scenario,
  medians: Sequence[float],
  sigmas: Sequence[float],
) -> list[Variant]:
  """Other log-normal lengths in every environment."""
  variants = []
  for sigma in sigmas:
    for median in medians:
      environments = {
        name: dataclasses.replace(
          environment,
          lengths=dataclasses.replace(
            environment.lengths, median=median, sigma=sigma, empirical=()
          ),
        )
        for name, environment in given.environments.items()
      }
      changed = dataclasses.replace(given, environments=environments)
      label = f"median {median:g}, sigma {sigma:g}"
      variants.append(Variant(label, median, f"sigma {sigma:g}", run, changed))
  return variants


def slower(
  run: settings_lib.RunSettings,
  given: scenarios.Scenario,
  factors: Sequence[float],
) -> list[Variant]:
  """Servers that take so many times as long for everything; and then the trainer's steps too."""
  variants = []
  for series in ("servers", "servers and trainer"):
    for factor in factors:
      servers = dataclasses.replace(
        given.servers,
        decode_tokens_per_second=tuple(
          rate / factor for rate in given.servers.decode_tokens_per_second
        ),
        seconds_per_cached_token=given.servers.seconds_per_cached_token * factor,
        prefill_tokens_per_second=given.servers.prefill_tokens_per_second / factor,
      )
      trainer = given.trainer
      if series != "servers":
        trainer = dataclasses.replace(
          trainer,
          fixed_seconds=trainer.fixed_seconds * factor,
          seconds_per_token=trainer.seconds_per_token * factor,
        )
      changed = dataclasses.replace(given, servers=servers, trainer=trainer)
      variants.append(Variant(f"{series}: {factor:g} x", factor, series, run, changed))
  return variants


def shrunk(
  run: settings_lib.RunSettings, given: scenarios.Scenario, factor: int
) -> tuple[settings_lib.RunSettings, scenarios.Scenario]:
  """The same run on a part of the cluster, each of whose parts is as busy as before.

  Batches, rollouts in flight, workers, servers and the trainer's devices are divided; a step takes
  about as long, in a part of the time to simulate it. What does not shrink with it are tails: of
  fewer rollouts the longest is shorter.

  Raises:
    ValueError: the factor does not divide them.
  """
  settings, workers = run.scheduler, max(1, run.num_workers)
  for field, value in (
    ("prompts_per_step", settings.prompts_per_step),
    ("max_rollouts_in_flight", settings.max_rollouts_in_flight),
    ("num_workers", workers),
    ("servers.count", given.servers.count),
    ("trainer.devices", given.trainer.devices),
  ):
    if factor < 1 or value % factor:
      raise ValueError(f"factor: expected a divisor of {field} ({value}), got {factor}")
  return (
    dataclasses.replace(
      run,
      scheduler=dataclasses.replace(
        settings,
        prompts_per_step=settings.prompts_per_step // factor,
        max_rollouts_in_flight=settings.max_rollouts_in_flight // factor,
      ),
      num_workers=workers // factor,
    ),
    dataclasses.replace(
      given,
      servers=dataclasses.replace(given.servers, count=given.servers.count // factor),
      trainer=dataclasses.replace(
        given.trainer,
        seconds_per_token=given.trainer.seconds_per_token * factor,
        devices=given.trainer.devices // factor,
      ),
    ),
  )


def with_steps(run: settings_lib.RunSettings, steps: int) -> settings_lib.RunSettings:
  """The run, so many steps long and without evaluations."""
  changed = dataclasses.replace(run.scheduler, steps=steps)
  return dataclasses.replace(run, scheduler=changed, evaluation_tasks=0)


def warm_up(run: settings_lib.RunSettings, least: int) -> int:
  """Steps after which a run has settled: `least`, and four times its bound on staleness.

  The first rollouts begin together and under one version; until that has washed out servers are
  busier or idler, and tokens fresher, than they will be.
  """
  return max(least, WARM_UP_FACTOR * run.scheduler.max_off_policy_steps)


def simulate(
  variants: Sequence[Variant],
  *,
  steps: int,
  least_warm_up: int,
  progress: Callable[[int, Variant], None] = lambda done, variant: None,
  failed: Callable[[Variant, Exception], None] = lambda variant, error: None,
) -> list[dict[str, Any]]:
  """Simulates each variant, and keeps the row of its figures.

  Args:
    variants: of one sweep.
    steps: measured, after the warm-up.
    least_warm_up: see `warm_up`.
    progress: is told how many are done and which is next.
    failed: is told of a variant that never gets to its last step, and why; it has no row.
  """
  rows = []
  for done, variant in enumerate(variants):
    progress(done, variant)
    left_out = warm_up(variant.run, least_warm_up)
    run = with_steps(variant.run, left_out + steps)
    try:
      report = throughput.simulate(run, variant.scenario, warm_up_steps=left_out)
    except (ports.RunFailed, clock.Stuck) as error:
      failed(variant, error)
      continue
    rows.append(
      {"label": variant.label, "x": variant.x, "series": variant.series, **figures(report)}
    )
  return rows


def figures(report: Mapping[str, Any]) -> dict[str, float]:
  """The figures of a report that a sweep shows; `drift` is that of the seconds a token."""
  tenths = report["by_length_decile"]
  return {
    "warm_up_steps": report["warm_up_steps"],
    "step_seconds": report["step_seconds"]["mean"],
    "drift": report["drift"].get("seconds_per_token", 0.0),
    "trainer_idle_share": report["trainer_idle_share"],
    "inference_idle_share": report["inference_idle_share"],
    "inference_paused_share": report["inference_paused_share"],
    "running_per_server": report["queues"]["running_per_server"],
    "token_staleness": report["staleness"]["token_mean"],
    "rollout_staleness": report["staleness"]["rollout_mean"],
    "stale_share": report["stale_share"],
    "longest_stale_share": tenths[-1]["stale_share"] if tenths else 0.0,
    "masked_token_share": report["masked_token_share"],
    "trained_tokens_per_second": report["trained_tokens_per_second"],
  }
