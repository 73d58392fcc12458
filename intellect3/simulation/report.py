"""What a simulation found: one JSON-able table of shares, times and counts.

Shares and means leave out the warm-up: they begin where its last training step ended, and end with
the run's last training step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intellect3.simulation import scenario, server, watching, workers
from intellect3.simulation import settings as settings_lib


def make(
  run: settings_lib.RunSettings,
  given: scenario.Scenario,
  *,
  watch: watching.Watch,
  traffic: workers.Traffic,
  usages: Sequence[tuple[server.Usage, server.Usage]],
  warm_up: int,
  samples: Sequence[tuple[float, Sequence[int], Sequence[int], int]],
  counts: Mapping[str, int],
  events: int,
) -> dict[str, Any]:
  """The report.

  Args:
    run: the run's settings.
    given: the scenario.
    watch: of the whole run.
    traffic: of the whole run.
    usages: of each server, at the end of the warm-up and of the run.
    warm_up: steps left out.
    samples: (seconds, running and waiting by server, waiting for a slot at the clients).
    counts: of the accounting, at the end.
    events: that happened in all.

  Returns:
    scenario, steps, warm_up_steps, seed; virtual_seconds: of the whole run.
    trainer_idle_share: of the time, waiting for a batch and reading it.
    inference_idle_share: of the servers' time, with nothing to decode or prefill;
    inference_paused_share, inference_prefill_share: standing still for weights, prefilling.
    step_seconds: mean, median, p90 of the time from the end of a training step to the next one's,
      and by_step, which the warm-up is part of.
    staleness: mean, max and histogram (shares) of the trained tokens; rollout_mean: of the oldest
      tokens of the rollouts, as the run's metric `staleness_mean`.
    stale_share, masked_token_share; by_length_decile: of the rollouts that were trained, stale or
      filtered, low and high length and what became of them: the whole run.
    groups: p50, p90, p99 seconds from dispatch to the first and the last end of a rollout.
    queues: requests running and waiting by server, on average, and the most that ever waited.
    sampled_tokens_per_second, trained_tokens_per_second.
    orchestrator: messages and bytes per second, and by kind in all.
    accounting: contract 3's counts.
    reprefilled: tokens computed again. slow_segments: rollouts with a segment that took longer than
      clients wait, for which a real client would have asked again.
    rows: the orchestrator's metrics of each step; syncs: (version, server, from, to);
    timeline: columns sampled at times, where asked for.
  """
  steps = watch.steps
  last = max(steps)
  begun = steps[warm_up]["ended"] if warm_up else watch.syncs[0][3]
  span = steps[last]["ended"] - begun
  measured = [steps[step] for step in sorted(steps) if step > warm_up]
  rows = [watch.rows[step] for step in sorted(watch.rows) if step > warm_up]
  waited = sum(marks["begun"] - max(marks["waiting"], begun) for marks in measured)
  servers = _servers(usages, span)
  ends = [watch.syncs[0][3], *(steps[step]["ended"] for step in sorted(steps))]
  by_step = np.diff(ends)
  return {
    "scenario": given.name,
    "steps": run.steps,
    "warm_up_steps": warm_up,
    "seed": run.scheduler.seed,
    "virtual_seconds": steps[last]["ended"],
    "trainer_idle_share": waited / span,
    **servers["shares"],
    "step_seconds": {
      **_spread(by_step[warm_up:], ("mean", "p50", "p90")),
      "by_step": by_step.tolist(),
    },
    "staleness": _staleness(watch, rows),
    **_losses(watch),
    "groups": {
      name: _spread([pair[index] for pair in watch.group_seconds], ("p50", "p90", "p99"))
      for index, name in enumerate(("first_seconds", "last_seconds"))
    },
    "queues": servers["queues"],
    "sampled_tokens_per_second": servers["sampled"] / span,
    "trained_tokens_per_second": sum(marks["tokens"] for marks in measured) / span,
    "orchestrator": _traffic(traffic, steps[last]["ended"]),
    "accounting": dict(counts),
    "reprefilled": servers["reprefilled"],
    "slow_segments": watch.slow_segments,
    "events": events,
    "training": [{"step": step, **steps[step]} for step in sorted(steps)],
    "rows": [{"step": step, **watch.rows[step]} for step in sorted(watch.rows)],
    "syncs": [list(sync) for sync in watch.syncs],
    "timeline": {
      "seconds": [sample[0] for sample in samples],
      "running": [list(sample[1]) for sample in samples],
      "waiting": [list(sample[2]) for sample in samples],
      "clients_waiting": [sample[3] for sample in samples],
    },
  }


def _servers(usages: Sequence[tuple[server.Usage, server.Usage]], span: float) -> dict[str, Any]:
  used = {
    field.name: sum(
      getattr(after, field.name) - getattr(before, field.name) for before, after in usages
    )
    for field in dataclasses.fields(server.Usage)
  }
  total = span * len(usages)
  busy = used["decoding"] + used["prefilling"] + used["paused"]
  return {
    "shares": {
      "inference_idle_share": max(0.0, 1.0 - busy / total),
      "inference_paused_share": used["paused"] / total,
      "inference_prefill_share": used["prefilling"] / total,
    },
    "queues": {
      "running_per_server": used["running"] / total,
      "waiting_per_server": used["waiting"] / total,
      "most_waiting": max(after.most_waiting for _, after in usages),
      "evicted": used["evicted"],
    },
    "reprefilled": {"retracted": used["retracted"], "prefilled": used["prefilled"]},
    "sampled": used["sampled"],
  }


def _spread(values: Any, names: Sequence[str]) -> dict[str, float]:
  array = np.asarray(values, np.float64)
  if not array.size:
    return {}
  return {
    name: float(array.mean() if name == "mean" else np.percentile(array, int(name[1:])))
    for name in names
  }


def _staleness(watch: watching.Watch, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  tokens = watch.staleness.total()
  return {
    "mean": sum(age * count for age, count in watch.staleness.items()) / max(1, tokens),
    "max": max(watch.staleness, default=0),
    "rollout_mean": float(np.mean([row["staleness_mean"] for row in rows])),
    "histogram": {str(age): watch.staleness[age] / tokens for age in sorted(watch.staleness)},
  }


def _losses(watch: watching.Watch) -> dict[str, Any]:
  kept = [entry for entry in watch.outcomes if entry[1] in ("trained", "stale", "filtered")]
  lengths = np.array([length for length, _, _ in kept], np.int64)
  outcomes = np.array([outcome for _, outcome, _ in kept], np.str_)
  masked = np.array([tokens for _, _, tokens in kept], np.int64)
  edges = np.quantile(lengths, np.linspace(0.1, 0.9, 9)) if kept else np.zeros(9)
  tenth = np.searchsorted(edges, lengths, side="left")
  deciles = []
  for index in range(10):
    inside = tenth == index
    if np.any(inside):
      deciles.append(
        {
          "decile": index,
          "low": int(lengths[inside].min()),
          "high": int(lengths[inside].max()),
          "rollouts": int(inside.sum()),
          **_lost(lengths[inside], outcomes[inside], masked[inside]),
        }
      )
  return {**_lost(lengths, outcomes, masked), "by_length_decile": deciles}


def _lost(lengths: np.ndarray, outcomes: np.ndarray, masked: np.ndarray) -> dict[str, float]:
  """Shares: of what would have been trained, stale; of trained tokens, masked; of all, filtered."""
  trained, stale = outcomes == "trained", outcomes == "stale"
  wanted = max(1, int(trained.sum() + stale.sum()))
  return {
    "stale_share": float(stale.sum() / wanted),
    "masked_token_share": float(masked[trained].sum() / max(1, lengths[trained].sum())),
    "filtered_share": float((outcomes == "filtered").mean()) if outcomes.size else 0.0,
  }


def _traffic(traffic: workers.Traffic, seconds: float) -> dict[str, Any]:
  return {
    "messages_per_second": traffic.messages.total() / seconds,
    "bytes_per_second": traffic.bytes.total() / seconds,
    "messages": dict(sorted(traffic.messages.items())),
    "bytes": dict(sorted(traffic.bytes.items())),
  }
