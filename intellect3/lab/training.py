"""Training the small policy on data that are `staleness` versions old.

Place in the ring: in the lab, the exact half's train loop. Step n starts from version n-1 and is
fed by version n-1-staleness (version 0 until there is one), as in the real loop. A run is one
compiled scan, mapped over stalenesses and seeds; return and entropy are exact.
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


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is made of besides its loss and its data's age.

  Attributes:
    steps: updates.
    group: trajectories per prompt in a batch; their mean reward is the baseline. A batch has all
      prompts.
    learning_rate: what `optimizer` gets.
    optimizer: optax. SGD applies the estimator itself; Adam, as in language models, hides its
      scale.
    mismatch: from the trainer's logits to the server's.
  """

  steps: int = 200
  group: int = 8
  learning_rate: float = 0.1
  optimizer: Callable[[float], optax.GradientTransformation] = optax.adam
  mismatch: mismatches.Mismatch = mismatches.none


class Run(NamedTuple):
  """What K stalenesses x S seeds of N steps did.

  Attributes:
    returns_KSN: NumPy, as all; float32 [K, S, N + 1], exact, of versions 0 to N.
    entropies_KSN: float32 [K, S, N + 1], of a trajectory, in nats.
    metrics: the loss's own metrics by name, float32 [K, S, N], of step n + 1 at index n.
    weights: float32 [K, S, N + 1, D, V], every version.
  """

  returns_KSN: Any
  entropies_KSN: Any
  metrics: dict[str, Any]
  weights: Any


def train(
  problem: policy.Problem,
  loss_fn: LossFn,
  *,
  stalenesses: Sequence[int],
  seeds: int,
  settings: Settings | None = None,
) -> Run:
  """Trains policies with one loss, one per staleness and seed.

  Args:
    problem: what is rewarded.
    loss_fn: of `intellect3.losses.policy_gradient` or of their signature.
    stalenesses: versions between the policy that is updated and the one that sampled, each >= 0.
    seeds: independent runs, numbered from 0; a number draws the same random keys for every loss
      and staleness, so that differences between losses are paired.
    settings: steps, batch, optimizer, mismatch.

  Raises:
    ValueError: where a staleness is below 0, there is none, or seeds, steps or group are below 1.
  """
  settings = settings or Settings()
  if not stalenesses or min(stalenesses) < 0:
    raise ValueError(f"stalenesses: expected numbers of at least 0, got {list(stalenesses)}")
  counts = {"seeds": seeds, "steps": settings.steps, "group": settings.group}
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f"{name}: expected at least 1, got {value}")
  one = functools.partial(_run, problem, loss_fn, settings)
  over_seeds = jax.vmap(one, in_axes=(None, 0))
  over_both = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))
  run = over_both(jnp.asarray(stalenesses, jnp.int32), jnp.arange(seeds))
  return jax.tree.map(np.asarray, run)


def _run(
  problem: policy.Problem,
  loss_fn: LossFn,
  settings: Settings,
  staleness: jax.Array,
  seed: jax.Array,
) -> Run:
  optimizer = settings.optimizer(settings.learning_rate)
  weights = policy.initial(problem)
  prompts_B = jnp.repeat(jnp.arange(problem.prompts), settings.group)
  everywhere = jnp.ones((prompts_B.size, problem.length), jnp.bool_)

  def step(carry: tuple[jax.Array, Any], inputs: tuple[jax.Array, jax.Array]):
    versions, moments = carry
    number, key = inputs
    server_key, sample_key = jax.random.split(key)
    behaviour = versions[jnp.maximum(number - 1 - staleness, 0)]
    server_logits = settings.mismatch(policy.logits(problem, behaviour), server_key)
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
  returns = jax.lax.map(functools.partial(policy.expected_return, problem), versions)
  entropies = jax.lax.map(functools.partial(policy.entropy, problem), versions)
  return Run(returns, entropies, metrics, versions)
