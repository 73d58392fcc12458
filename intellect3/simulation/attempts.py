"""What simulated attempts at tasks turn out to be: lengths, turns, waits, rewards, failures.

Everything is drawn from the scenario's seed, the task and the rollout's own seed, so that it does
not depend on when or where a rollout runs: two clusters are compared on the same attempts.
"""

import dataclasses
import math
import random
from collections.abc import Sequence

from intellect3.rollouts import messages
from intellect3.simulation import scenario


@dataclasses.dataclass(slots=True)
class Turn:
  """One turn of an attempt.

  Attributes:
    wait_seconds: before it, for a tool.
    given: tokens that come in with it.
    sampled: tokens that the policy adds.
  """

  wait_seconds: float
  given: int
  sampled: int


@dataclasses.dataclass(slots=True)
class Attempt:
  """A rollout as it will turn out.

  Attributes:
    turns: in order; the first one's `given` is the prompt, which the group shares.
    reward_seconds: after the last turn.
    reward: None where the attempt fails.
    truncated: whether a bound on lengths cut it.
  """

  turns: Sequence[Turn]
  reward_seconds: float
  reward: float | None
  truncated: bool


class Attempts:
  """Draws attempts.

  Args:
    given: the scenario.
    names: the run's environments.
    max_new_tokens: bound on the sampled tokens of a turn.
    max_tokens: bound on prompt, incoming and sampled tokens together.

  Raises:
    ValueError: an environment is not described, or its prompts leave no room for an answer.
  """

  def __init__(
    self,
    given: scenario.Scenario,
    names: Sequence[str],
    *,
    max_new_tokens: int,
    max_tokens: int,
  ) -> None:
    self._seed = given.seed
    self._rng = random.Random()  # seeded for each attempt
    self._environments: dict[str, scenario.Environment] = {}
    self._most: dict[str, int] = {}  # sampled tokens of an attempt, by environment
    self._tasks: dict[tuple[str, str, int], tuple[float, float]] = {}
    for name in names:
      self._environments[name] = environment = given.environment(name)
      incoming = environment.prompt_tokens + (environment.turns - 1) * environment.turn_tokens
      if max_tokens - incoming < environment.turns:
        raise ValueError(
          f"environments.{name}: expected prompt_tokens and turn_tokens of all turns to leave room "
          f"for an answer in max_tokens ({max_tokens}), got {incoming}"
        )
      self._most[name] = min(
        max_tokens - incoming, environment.turns * max_new_tokens, environment.lengths.maximum
      )

  def draw(self, dispatch: messages.Dispatch) -> Attempt:
    """The attempt that a dispatch turns out to be."""
    environment = self._environments[dispatch.environment]
    common, solved = self._task(environment, dispatch)
    rng = self._rng
    rng.seed(dispatch.seed ^ self._seed)
    share = environment.lengths.task_share
    normal = math.sqrt(share) * common + math.sqrt(1.0 - share) * rng.gauss()
    wanted = length(environment.lengths, normal)
    turns = environment.turns
    sampled = max(turns, min(wanted, self._most[dispatch.environment]))
    failed = rng.random() < environment.error_rate
    reward = float(rng.random() < solved)
    drawn = [Turn(0.0, environment.prompt_tokens, sampled // turns)]
    for turn in range(1, turns):
      wait = rng.expovariate(1.0) * environment.tool_seconds
      share_of_it = sampled * (turn + 1) // turns - sampled * turn // turns
      drawn.append(Turn(wait, environment.turn_tokens, share_of_it))
    return Attempt(drawn, environment.reward_seconds, None if failed else reward, wanted > sampled)

  def _task(
    self, environment: scenario.Environment, dispatch: messages.Dispatch
  ) -> tuple[float, float]:
    """(normal number, chance of success) that all attempts at a task share."""
    key = dispatch.environment, dispatch.split, dispatch.index
    if key not in self._tasks:
      rng = random.Random("/".join(map(str, (self._seed, *key))))
      self._tasks[key] = rng.gauss(), rng.choice(environment.solved)
    return self._tasks[key]


def length(lengths: scenario.Lengths, normal: float) -> int:
  """The length at a standard normal number; longer for a larger one.

  Args:
    lengths: the distribution.
    normal: the number.
  """
  if lengths.empirical:
    quantile = 0.5 * (1.0 + math.erf(normal / math.sqrt(2.0)))
    place = min(len(lengths.empirical) - 1, int(quantile * len(lengths.empirical)))
    return max(lengths.minimum, int(lengths.empirical[place]))
  drawn = lengths.median * math.exp(min(50.0, lengths.sigma * normal))
  return max(lengths.minimum, round(drawn))
