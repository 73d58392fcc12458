"""Small makers that the tests of this folder share."""

import socket

from intellect3 import rollout_log
from intellect3.rollouts import credit as credit_lib
from intellect3.rollouts import difficulty, filters, messages, scheduler


def make_settings(**changes):
  values = dict(
    steps=5,
    prompts_per_step=2,
    rollouts_per_prompt=3,
    max_off_policy_steps=1,
    max_rollouts_in_flight=12,
  )
  return scheduler.Settings(**{**values, **changes})


def make_scheduler(
  settings=None,
  *,
  pools=None,
  group_filters=None,
  sizes=None,
  weights=None,
  seed=0,
  credit=None,
):
  sizes = sizes or {"words": 50}
  sampler = difficulty.TaskSampler(
    sizes, weights or dict.fromkeys(sizes, 1.0), pools or difficulty.Pools(), seed
  )
  return scheduler.Scheduler(
    settings or make_settings(),
    sampler,
    group_filters or filters.Filters(),
    credit or credit_lib.Credit(),
  )


def make_summary(dispatch, *, reward=0.0, version=0, newest=None, **changes):
  values = dict(
    rollout_id=dispatch.rollout_id,
    group_id=dispatch.group_id,
    purpose=dispatch.purpose,
    environment=dispatch.environment,
    reward=reward,
    error=None,
    truncated=False,
    lengths=[7],
    sampled_tokens=4,
    oldest_version=version,
    newest_version=version if newest is None else newest,
    servers=["http://a"],
    metrics={},
    seconds=0.1,
  )
  return messages.RolloutSummary(**{**values, **changes})


def all_records(log_dir, manifest):
  """Every record of a committed step, in order."""
  count = sum(len(entry.lengths) for entry in manifest.shards)
  return list(rollout_log.read_records(log_dir, manifest, range(count)).values())


def free_port():
  """A port on this machine that nothing listens on now."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def finish_group(machine, dispatches, rewards, **changes):
  for dispatch, reward in zip(dispatches, rewards, strict=True):
    machine.finished(make_summary(dispatch, reward=reward, **changes))


def groups(dispatches, size=3):
  return [dispatches[i : i + size] for i in range(0, len(dispatches), size)]
