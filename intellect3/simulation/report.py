"""What a simulation found: one JSON-able table of shares, times and counts.

Every figure but those said to be of the whole run leaves the warm-up out. The trainer's are of its
steps after the warm-up, from end to end; all others are of the time from the commit of the
warm-up's last batch to that of the run's last one (`window`). Without a warm-up both begin where
the servers have their first weights.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intellect3.rollouts import accounting
from intellect3.simulation import scenario, server, watching, window
from intellect3.simulation import settings as settings_lib


def make(
  run: settings_lib.RunSettings,
  given: scenario.Scenario,
  *,
  watch: watching.Watch,
  begun: window.Mark,
  done: window.Mark,
  warm_up: int,
  samples: Sequence[tuple[float, Sequence[int], Sequence[int], int]],
  counts: Mapping[str, int],
  events: Mapping[str, int],
) -> dict[str, Any]:
  """The report.

  Args:
    run: the run's settings.
    given: the scenario.
    watch: of the whole run.
    begun: at the commit of the warm-up's last batch.
    done: at the commit of the run's last batch.
    warm_up: steps left out.
    samples: (seconds, running and waiting by server, waiting for a slot at the clients).
    counts: of the accounting, at the end.
    events: that happened in all, by kind.

  Returns:
    scenario, steps, warm_up_steps, settling_steps, seed; virtual_seconds: of the whole run.
    events: of the whole run: lines of its trace, messages, ends of segments on servers.
    measured_seconds: between the two commits.
    trainer_idle_share: of the time, waiting for a batch and reading it.
    inference_idle_share: of the servers' time, with nothing to decode or prefill;
    inference_paused_share, inference_prefill_share: standing still for weights, prefilling;
    inference_lost_share: not there (`scenario.Failures`).
    step_seconds: mean, median, p90 of the time from the end of a training step to the next one's,
      and by_step, which the warm-up is part of.
    drift: of the second half of the measured steps against the first: seconds_per_token (of the
      batches; relative) and rollout_staleness, stale_share (differences). Far from 0: not settled.
    staleness: token_mean, max and histogram (shares) of the trained tokens; rollout_mean: of each
      rollout's oldest token, as the run's metric `staleness_mean`.
    stale_share, masked_token_share, filtered_share; by_length_decile: of the rollouts that were
      trained, stale or filtered, low and high length and what became of them.
    errored_share: of all rollouts that ended, those that failed.
    groups: p50, p90, p99 seconds from dispatch to the first and the last end of a rollout.
    queues: requests running and waiting by server, on average, the most that waited at one, and
      those put back by a full cache.
    sampled_tokens_per_second, trained_tokens_per_second.
    orchestrator: messages and bytes, by kind, and per second.
    ended: rollouts by outcome. accounting: contract 3's counts, of the whole run.
    reprefilled: tokens computed again of running requests (`retracted`) and of conversations whose
      next turn found other weights or another server (`continued`), and all that were prefilled.
    slow_segments: rollouts with a segment that took longer than clients wait, for which a real
      client would have asked again.
    training: marks of each step, `committed` of its batch; rows: the orchestrator's metrics of each
      step; syncs: (version, server, from, to); timeline: columns sampled at times, where asked for.
      All of the whole run.
  """
  steps = watch.steps
  last = max(steps)
  assert watch.started is not None
  ends = [watch.started, *(steps[step]["ended"] for step in sorted(steps))]
  trained_for = ends[-1] - ends[warm_up]
  measured = [steps[step] for step in sorted(steps) if step > warm_up]
  waited = sum(marks["begun"] - max(marks["waiting"], ends[warm_up]) for marks in measured)
  rows = [row for step, row in watch.rows.items() if step > warm_up]
  span = done.seconds - begun.seconds
  servers = _servers(list(zip(begun.usages, done.usages, strict=True)), span)
  by_step = np.diff(ends)
  ended = {name: done.counts[name] - begun.counts[name] for name in accounting.OUTCOMES}
  groups = watch.group_seconds[begun.groups : done.groups]
  return {
    "scenario": given.name,
    "steps": run.steps,
    "warm_up_steps": warm_up,
    "settling_steps": run.settling_steps,
    "seed": run.scheduler.seed,
    "virtual_seconds": steps[last]["ended"],
    "measured_seconds": span,
    "trainer_idle_share": waited / trained_for,
    **servers["shares"],
    "step_seconds": {
      **_spread(by_step[warm_up:], ("mean", "p50", "p90")),
      "by_step": by_step.tolist(),
    },
    "drift": _drift(watch, ends, warm_up),
    "staleness": _staleness(watch, rows, warm_up),
    **_losses(watch.outcomes[begun.outcomes : done.outcomes]),
    "errored_share": ended["errored"] / max(1, sum(ended.values())),
    "groups": {
      name: _spread([pair[index] for pair in groups], ("p50", "p90", "p99"))
      for index, name in enumerate(("first_seconds", "last_seconds"))
    },
    "queues": servers["queues"],
    "sampled_tokens_per_second": servers["sampled"] / span,
    "trained_tokens_per_second": sum(marks["tokens"] for marks in measured) / trained_for,
    "orchestrator": _traffic(begun, done),
    "ended": ended,
    "accounting": dict(counts),
    "reprefilled": {
      **servers["reprefilled"],
      "continued": sum(row["reprefilled_tokens/continued"] for row in rows),
    },
    "slow_segments": done.slow_segments - begun.slow_segments,
    "events": dict(events),
    "training": [
      {"step": step, "committed": watch.commits[step], **steps[step]} for step in sorted(steps)
    ],
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
  busy = used["decoding"] + used["prefilling"] + used["paused"] + used["lost"]
  return {
    "shares": {
      "inference_idle_share": max(0.0, 1.0 - busy / total),
      "inference_paused_share": used["paused"] / total,
      "inference_lost_share": used["lost"] / total,
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


def _drift(watch: watching.Watch, ends: Sequence[float], warm_up: int) -> dict[str, float]:
  """Second half against first; an odd number of steps leaves the one in the middle out.

  Time is told by token: batches are drawn, and those of one half may just be longer.
  """
  last = len(ends) - 1
  half = (last - warm_up) // 2
  if not half:
    return {}
  rows, paces, ages, stale = watch.rows, [], [], []
  for low, high in ((warm_up, warm_up + half), (last - half, last)):
    steps = range(low + 1, high + 1)
    tokens = sum(watch.steps[step]["tokens"] for step in steps)
    paces.append((ends[high] - ends[low]) / tokens)
    ages.append(float(np.mean([rows[step]["staleness_mean"] for step in steps])))
    lost, kept = (
      rows[high][name] - (rows[low][name] if low else 0.0) for name in ("stale", "trained")
    )
    stale.append(lost / max(1.0, lost + kept))
  return {
    "seconds_per_token": paces[1] / paces[0] - 1.0,
    "rollout_staleness": ages[1] - ages[0],
    "stale_share": stale[1] - stale[0],
  }


def _staleness(
  watch: watching.Watch, rows: Sequence[Mapping[str, float]], warm_up: int
) -> dict[str, Any]:
  ages: Counter[int] = Counter()
  for step, tokens in watch.staleness.items():
    if step > warm_up:
      ages.update(tokens)
  total = ages.total()
  return {
    "token_mean": sum(age * count for age, count in ages.items()) / max(1, total),
    "rollout_mean": float(np.mean([row["staleness_mean"] for row in rows])),
    "max": max(ages, default=0),
    "histogram": {str(age): ages[age] / total for age in sorted(ages)},
  }


def _losses(ended: Sequence[tuple[int, str, int]]) -> dict[str, Any]:
  kept = [entry for entry in ended if entry[1] in ("trained", "stale", "filtered")]
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


def _traffic(begun: window.Mark, done: window.Mark) -> dict[str, Any]:
  seconds = done.seconds - begun.seconds
  sent, size = done.messages - begun.messages, done.bytes - begun.bytes
  return {
    "messages_per_second": sent.total() / seconds,
    "bytes_per_second": size.total() / seconds,
    "messages": dict(sorted(sent.items())),
    "bytes": dict(sorted(size.items())),
  }
