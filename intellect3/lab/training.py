"""Training the small policy on data that are `staleness` versions old.

Place in the ring: in the lab, the exact half's train loop. Step n starts from version n-1 and is
fed by version n-1-staleness (version 0 until there is one), as in the real loop. A run is one
compiled scan, mapped over the cells of a sweep and over seeds, each with a problem of its own, so
that an interval over seeds is one over problems too; return and entropy are exact.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from intellect3.lab import mismatch as mismatches
from intellect3.lab import policy
from intellect3.losses import advantages

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Cell(NamedTuple):
  """One point of a sweep.

  Attributes:
    staleness: versions between the policy that is updated and the one that sampled, >= 0.
    learning_rate: what `Settings.optimizer` gets.
    mismatch: the amount of `Settings.mismatch`; 0 is none.
  """

  staleness: Any
  learning_rate: Any
  mismatch: Any = 0.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is made of besides its loss and its cell.

  Attributes:
    steps: updates.
    group: trajectories per prompt in a batch; their mean reward is the baseline. A batch has all
      prompts.
    optimizer: optax, given the learning rate. SGD applies the estimator itself; Adam, as with
      language models, hides its scale.
    mismatch: from the trainer's logits to the server's, at each cell's amount.
    evaluate_every: return and entropy are computed of every so many versions.
  """

  steps: int = 200
  group: int = 8
  optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam
  mismatch: mismatches.Mismatch = mismatches.gaussian
  evaluate_every: int = 5

  def __post_init__(self):
    for name in ("steps", "group", "evaluate_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
    if self.steps % self.evaluate_every:
      raise ValueError(
        f"evaluate_every: expected a divisor of steps ({self.steps}), got {self.evaluate_every}"
      )

  @property
  def evaluated(self) -> np.ndarray:
    """The versions of which return and entropy are computed: int [E], from 0 to `steps`."""
    return np.arange(0, self.steps + 1, self.evaluate_every)


class Run(NamedTuple):
  """What C cells x S seeds of N steps did, as NumPy arrays.

  Attributes:
    returns_CSE: float32, exact, of the versions `Settings.evaluated`.
    entropies_CSE: float32, of a trajectory, in nats, likewise.
    metrics: the loss's own metrics by name, float32 [C, S, N], of step n at index n - 1.
    weights: float32 [C, S, N + 1, D, V], every version.
  """

  returns_CSE: Any
  entropies_CSE: Any
  metrics: dict[str, Any]
  weights: Any


def train(
  problems: Sequence[policy.Problem],
  loss_fn: LossFn,
  *,
  cells: Sequence[Cell],
  settings: Settings,
) -> Run:
  """Trains policies with one loss, one per cell and seed.

  Args:
    problems: what is rewarded, a problem a seed: seed s, counted from 0, trains on problems[s].
      A number draws the same random keys for every loss and cell, so that differences between
      losses are paired. `[problem] * S` is S seeds of one problem.
    loss_fn: of `intellect3.losses.policy_gradient` or of their signature.
    cells: all are run at once.
    settings: steps, batch, optimizer, mismatch.

  Raises:
    ValueError: where there is no cell, a staleness is below 0, or there is no problem, or their
      shapes differ.
  """
  if not cells or min(cell.staleness for cell in cells) < 0:
    raise ValueError(f"cells: expected stalenesses of at least 0, got {list(cells)}")
  stacked = policy.stack(problems)
  one = functools.partial(_run, loss_fn, settings)
  over_seeds = jax.vmap(one, in_axes=(None, 0, 0))
  over_both = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
  table = Cell(
    staleness=jnp.asarray([cell.staleness for cell in cells], jnp.int32),
    learning_rate=jnp.asarray([cell.learning_rate for cell in cells], jnp.float32),
    mismatch=jnp.asarray([cell.mismatch for cell in cells], jnp.float32),
  )
  run = over_both(table, stacked, jnp.arange(len(problems)))
  return jax.tree.map(np.asarray, run)


def _run(
  loss_fn: LossFn,
  settings: Settings,
  cell: Cell,
  problem: policy.Problem,
  seed: jax.Array,
) -> Run:
  optimizer = settings.optimizer(cell.learning_rate)
  weights = policy.initial(problem)
  prompts_B = jnp.repeat(jnp.arange(problem.prompts), settings.group)
  everywhere = jnp.ones((prompts_B.size, problem.length), jnp.bool_)

  def step(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]):
    versions, moments = carry
    number, key = inputs
    server_key, sample_key = jax.random.split(key)
    behaviour = versions[jnp.maximum(number - 1 - cell.staleness, 0)]
    server_logits = settings.mismatch(policy.logits(problem, behaviour), server_key, cell.mismatch)
    tokens = policy.sample(server_logits, prompts_B, sample_key)
    inference_logprobs = policy.logprobs(server_logits, prompts_B, tokens)
    advantages_B = advantages.group_mean(policy.reward(problem, prompts_B, tokens), prompts_B)
    advantages_BT = jnp.broadcast_to(advantages_B[:, None], everywhere.shape)

    def objective(weights: jax.Array):
      logprobs = policy.logprobs(policy.logits(problem, weights), prompts_B, tokens)
      return loss_fn(logprobs, inference_logprobs, advantages_BT, everywhere)

    newest = versions[number - 1]
    gradient, metrics = jax.grad(objective, has_aux=True)(newest)
    updates, moments = optimizer.update(gradient, moments, newest)
    return (versions.at[number].set(optax.apply_updates(newest, updates)), moments), metrics

  versions = jnp.zeros((settings.steps + 1, *weights.shape), weights.dtype).at[0].set(weights)
  keys = jax.random.split(jax.random.key(seed), settings.steps)
  numbers = jnp.arange(1, settings.steps + 1)
  carry = (versions, optimizer.init(weights))
  (versions, _), metrics = jax.lax.scan(step, carry, (numbers, keys))
  evaluated = versions[settings.evaluated]
  returns = jax.lax.map(functools.partial(policy.expected_return, problem), evaluated)
  entropies = jax.lax.map(functools.partial(policy.entropy, problem), evaluated)
  return Run(returns, entropies, metrics, versions)
