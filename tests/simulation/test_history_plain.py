"""The quick scheduler against a plain one that walks over everything each time it is asked."""

import collections
import random

from intellect3.rollouts import credit, difficulty, filters, scheduler
from tests.rollouts.helpers import make_settings, make_summary


class Plain(scheduler.Scheduler):
  """Counts, looks and sorts anew at every call."""

  def _may_dispatch(self):
    self._running = sum(len(group.running) for group in self._groups.values())
    return super()._may_dispatch()

  def _batchable(self, most):
    if self._settings.batch_order == "completion":
      return list(self._completed)[:most]
    ready = []
    for group_id, group in self._groups.items():
      if group.running:
        break
      ready.append(group_id)
    return ready[:most]

  def _drop_stale(self, oldest):
    for group_id in list(self._completed):
      group = self._groups[group_id]
      for key in self._trainable(group):
        summary = group.summaries[key]
        drop = self._settings.staleness_rule == "drop"
        if (summary.oldest_version if drop else summary.newest_version) < oldest:
          self._end(key, "stale", self._settings.staleness_rule)
      if not self._trainable(group):
        del self._completed[group_id]
        del self._groups[group_id]


def run(make, seed):
  """Every answer of a scheduler to a random course of events, a function of the seed alone."""
  rng = random.Random(seed)
  settings = make_settings(
    steps=8,
    prompts_per_step=rng.randint(1, 4),
    rollouts_per_prompt=rng.randint(2, 4),
    max_off_policy_steps=rng.randint(0, 3),
    max_rollouts_in_flight=rng.choice([4, 12, 40]),
    staleness_rule=rng.choice(["drop", "mask"]),
    batch_order=rng.choice(["completion", "dispatch"]),
  )
  pools = difficulty.Pools(easy_threshold=1.0, easy_fraction=0.2, hard_threshold=0.0)
  moving = credit.Credit(advantage_fn=credit.MovingBaseline())
  given = rng.choice([credit.Credit(), moving])

  def new():
    sampler = difficulty.TaskSampler({"words": 500}, {"words": 1.0}, pools, seed)
    return make(settings, sampler, filters.Filters(truncated=True), given)

  machine, running, told = new(), {}, []
  sent = set()  # to workers that are there
  machine.weights(0)
  for _ in range(250):
    started = machine.dispatch()
    running.update({dispatch.rollout_id: dispatch for dispatch in started})
    sent |= {dispatch.rollout_id for dispatch in started}
    plan = machine.plan_batch()
    told.append((started, plan, machine.take_forgotten(), machine.accounting.counts()))
    if plan is not None and rng.random() < 0.7:
      machine.commit(plan)
      told.append((machine.state(), machine.take_ended_lengths(), machine.pool_counts()))
    event = rng.random()
    if event < 0.75 and running:
      dispatch = running.pop(rng.choice(sorted(running)[:9]))
      oldest = rng.randint(max(0, machine.version - 3), machine.version)
      failed = rng.random() < 0.1
      machine.finished(
        make_summary(
          dispatch,
          reward=None if failed else float(rng.randint(0, 2)),
          error="broke" if failed else None,
          truncated=rng.random() < 0.1,
          version=oldest,
          newest=rng.randint(oldest, machine.version),
        )
      )
    elif event < 0.85:
      machine.weights(min(machine.version + rng.randint(0, 2), machine.next_step - 1))
    elif event < 0.93:
      everything = sorted(sent.intersection(machine.accounting.open_rollouts()))
      lost = rng.sample(everything, min(len(everything), rng.randint(1, 5)))
      if rng.random() < 0.5:
        machine.lost(lost, "server fenced")
      else:
        machine.again(lost)
        sent -= set(lost)
      running = {key: dispatch for key, dispatch in running.items() if key not in lost}
    elif event < 0.94:
      state, version = machine.state(), machine.version
      machine = new()
      machine.restore(state, state["accounting"]["dispatched"])
      machine.weights(version)
      running, sent = {}, set()
  told += [machine.cancel_all("end"), machine.accounting.counts()]
  return told


def test_quick_and_plain_answer_alike():
  ended = collections.Counter()
  for seed in range(60):
    quick = run(scheduler.Scheduler, seed)
    assert quick == run(Plain, seed), f"seed {seed}"
    ended.update(quick[-1])
  # The courses have reached what they compare.
  assert min(ended[key] for key in ("trained", "filtered", "stale", "errored", "cancelled")) > 50
