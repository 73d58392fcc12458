"""Small clusters and runs whose times can be worked out by hand."""

from intellect3.rollouts import filters, scheduler
from intellect3.simulation import scenario, settings


def servers(**changes):
  """Each request gets 100 tokens a second, whatever else runs; prompts cost next to nothing."""
  return scenario.Servers(
    **{
      "count": 1,
      "max_running": 64,
      "decode_batch": (1, 64),
      "decode_tokens_per_second": (100.0, 6400.0),
      "prefill_tokens_per_second": 1e12,
      **changes,
    }
  )


def environment(**changes):
  """Every attempt samples 200 tokens."""
  lengths = changes.pop("lengths", scenario.Lengths(median=200))
  return scenario.Environment(**{"lengths": lengths, "prompt_tokens": 8, **changes})


def cluster(**changes):
  """One server, a trainer that takes 3 s a step, and half a second to gather."""
  return scenario.Scenario(
    **{
      "name": "scene",
      "servers": servers(),
      "trainer": scenario.Trainer(fixed_seconds=3.0, gather_seconds=0.5, write_seconds=0.25),
      "sync": scenario.Sync(load_seconds=0.25),
      "environments": {"default": environment()},
      **changes,
    }
  )


def run(**changes):
  """Two groups of two a step, one step's rollouts at a time, no filter, synchronous."""
  given = {
    "sizes": {"coin/train": 50, "coin/eval": 4},
    "environment_weights": {"coin": 1.0},
    "group_filters": filters.Filters(zero_advantage=False),
    "max_new_tokens": 1000,
    "max_tokens": 2000,
  }
  for name in list(changes):
    if name in settings.RunSettings.__dataclass_fields__:
      given[name] = changes.pop(name)
  chosen = scheduler.Settings(
    **{
      "steps": 10,
      "prompts_per_step": 2,
      "rollouts_per_prompt": 2,
      "max_off_policy_steps": 0,
      "max_rollouts_in_flight": 4,
      **changes,
    }
  )
  return settings.RunSettings(scheduler=chosen, **given)
