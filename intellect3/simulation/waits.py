"""How long messages took in a finished run, of which its files say nothing: found by simulating it.

Place in the ring: beside it; `tools.simulate_demo` puts it into what `reality` has measured. Of the
rollouts that the scheduler has in flight some run at a worker and are counted there
(`rollout_seconds_mean`); the others are messages, or not yet noticed. The more a message takes, the
fewer run: so the number that ran tells how much it took.
"""

import dataclasses

from intellect3.simulation import reality, scenario, settings, sweep, throughput

STEPS = 60
"""Of each simulation."""
WARM_UP = 10
"""Of these, left out."""
TRIES = 6
"""Halvings of where the answer lies."""


def message_seconds(
  run: settings.RunSettings, given: scenario.Scenario, *, running: float, ended_per_second: float
) -> float:
  """Seconds of a message, each way, with which as many rollouts run in a simulation as did.

  Args:
    run: the run's settings.
    given: its cluster, with messages that take no time.
    running: rollouts at the workers, on average (`reality.running`).
    ended_per_second: rollouts: the most that a message can have taken is what those that did not
      run, of all that may be in flight, make by Little's law.

  Returns:
    0 where no more run in a simulation even so.
  """
  short = sweep.with_steps(run, STEPS)

  def runs(seconds: float) -> float:
    clients = dataclasses.replace(given.clients, message_seconds=seconds)
    changed = dataclasses.replace(given, clients=clients)
    report = throughput.simulate(short, changed, warm_up_steps=WARM_UP)
    return reality.running(report["rows"][WARM_UP:])

  low = 0.0
  high = max(0.0, run.scheduler.max_rollouts_in_flight - running) / (2 * ended_per_second)
  if high == 0.0 or runs(low) <= running:
    return low
  for _ in range(TRIES):
    middle = (low + high) / 2
    if runs(middle) > running:
      low = middle
    else:
      high = middle
  return (low + high) / 2
