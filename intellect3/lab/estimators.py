"""Bias and variance of a correction's update, exactly.

Place in the ring: in the lab, beside `training`. What a loss does to one trajectory is its gradient
there; since all trajectories can be listed, its expectation under the behaviour policy and its
variance are sums, and the policy gradient it should estimate is known.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intellect3.lab import policy, training
from intellect3.losses import policy_gradient


class Estimate(NamedTuple):
  """A correction's update against the exact policy gradient g; u is one trajectory's update.

  Attributes:
    bias: ||E u - g|| / ||g||; 0 is unbiased, 1 is as wrong as no update at all.
    cosine: between E u and g; what counts where the optimizer hides the scale.
    norm: ||E u|| / ||g||, how much of the gradient's length is left.
    noise: sqrt(E ||u - E u||^2) / ||g||, of one trajectory; of n it is sqrt(n) times less.
    effective_sample_share: (E w)^2 / E w^2 of the weights w that multiply a token's advantage.
    masked_share: of tokens, as the loss's own metric says.
    sequence_masked_share: of tokens of trajectories removed whole, likewise.
    mismatch_kl: nats a token, likewise; the same for every loss.
  """

  bias: Any
  cosine: Any
  norm: Any
  noise: Any
  effective_sample_share: Any
  masked_share: Any
  sequence_masked_share: Any
  mismatch_kl: Any


def policy_gradient_of(problem: policy.Problem, weights_DV: jax.Array) -> jax.Array:
  """The gradient of the expected return, divided by T as a mean over tokens is: [D, V]."""
  gradient = jax.grad(functools.partial(policy.expected_return, problem))
  return gradient(weights_DV) / problem.length


def estimate(
  problem: policy.Problem,
  loss_fn: training.LossFn,
  weights_DV: jax.Array,
  server_logits_MTPV: jax.Array,
) -> Estimate:
  """What the loss makes of trajectories of the server's policy, at the trainer's weights.

  The advantage is the reward minus the prompt's mean reward under the server's policy: the group
  baseline of a group without end. Every trajectory is a batch of its own.

  Args:
    problem: the trajectories and rewards.
    loss_fn: of the losses' signature, with `denominator` and `num_sequences`.
    weights_DV: of the policy to update.
    server_logits_MTPV: of the policy that sampled.
  """
  prompts, tokens, rewards = policy.every_trajectory(problem)
  probability = policy.probabilities(problem, server_logits_MTPV)
  inference_logprobs = policy.logprobs(server_logits_MTPV, prompts, tokens)
  logits = policy.logits(problem, weights_DV)
  logprobs = policy.logprobs(logits, prompts, tokens)
  by_prompt = (probability * rewards).reshape(problem.prompts, -1).sum(axis=1)
  advantages = rewards - by_prompt[prompts] * problem.prompts

  def one(logprobs_T: jax.Array, inference_logprobs_T: jax.Array, advantage: jax.Array):
    return loss_fn(
      logprobs_T[None],
      inference_logprobs_T[None],
      jnp.broadcast_to(advantage, logprobs_T[None].shape),
      jnp.ones(logprobs_T[None].shape, jnp.bool_),
      denominator=jnp.float32(problem.length),
      num_sequences=jnp.float32(1),
    )

  of_every = jax.vmap(jax.grad(one, has_aux=True))
  gradients_BT, metrics = of_every(logprobs, inference_logprobs, advantages)
  # A penalty does not depend on the advantage: it is no weight of it.
  penalties_BT, _ = of_every(logprobs, inference_logprobs, jnp.zeros_like(advantages))
  updates_BDV = -_through_softmax(problem, logits, prompts, tokens, gradients_BT)
  expected = jnp.einsum("b,bdv->dv", probability, updates_BDV)
  spread = jnp.sum(probability * jnp.sum(jnp.square(updates_BDV - expected), axis=(1, 2)))
  exact = policy_gradient_of(problem, weights_DV)
  length = jnp.linalg.norm(exact)
  weights_BT = _ratio((penalties_BT - gradients_BT) * problem.length, advantages[:, None])

  def mean(values: jax.Array) -> jax.Array:
    return jnp.sum(probability * values)

  return Estimate(
    bias=jnp.linalg.norm(expected - exact) / length,
    cosine=_ratio(jnp.sum(expected * exact), jnp.linalg.norm(expected) * length),
    norm=jnp.linalg.norm(expected) / length,
    noise=jnp.sqrt(spread) / length,
    effective_sample_share=_ratio(
      jnp.square(mean(weights_BT.mean(axis=1))), mean(jnp.square(weights_BT).mean(axis=1))
    ),
    masked_share=mean(metrics["masked_share"]),
    sequence_masked_share=mean(metrics["sequence_masked_share"]),
    mismatch_kl=mean(metrics["mismatch_kl"]),
  )


def study(
  problems: Sequence[policy.Problem],
  losses: Mapping[str, training.LossFn],
  *,
  cells: Sequence[training.Cell],
  steps: Sequence[int],
  settings: training.Settings,
) -> dict[str, Estimate]:
  """Every correction on the same pairs of policies, along on-policy training.

  Version n of a run without staleness or mismatch, trained with REINFORCE, is updated by
  trajectories that the server sampled from its version n - staleness. So all corrections see the
  same policies, those of a healthy run.

  Args:
    problems: one a seed, as in `training.train`; a seed's run is on its own problem.
    losses: by name.
    cells: staleness and mismatch; the learning rate, the same in all, is that of the run.
    steps: the versions n; an estimate is the mean over them.
    settings: of the runs, which take as many steps as they need, and the kind of mismatch.

  Returns:
    Per name estimates with NumPy arrays [C, S].

  Raises:
    ValueError: where a staleness is above the least of `steps`, or learning rates differ.
  """
  rates = {cell.learning_rate for cell in cells}
  if len(rates) != 1:
    raise ValueError(f"cells: expected one learning rate, got {sorted(rates)}")
  if max(cell.staleness for cell in cells) > min(steps):
    raise ValueError(
      f"cells: expected stalenesses of at most the least of steps ({min(steps)}), got "
      f"{max(cell.staleness for cell in cells)}"
    )
  run = training.train(
    problems,
    policy_gradient.reinforce_loss,
    cells=[training.Cell(0, rates.pop())],
    settings=dataclasses.replace(settings, steps=max(steps), evaluate_every=max(steps)),
  )
  stacked = policy.stack(problems)
  shape = (len(cells), len(problems), len(steps))
  cell, seed, step = (index.ravel() for index in np.indices(shape))
  versions = jnp.asarray(run.weights[0])
  pairs = (
    jnp.asarray(seed),
    versions[seed, np.asarray(steps)[step]],
    versions[seed, np.asarray(steps)[step] - np.asarray([c.staleness for c in cells])[cell]],
    jnp.asarray([c.mismatch for c in cells], jnp.float32)[cell],
    jax.random.split(jax.random.key(0), cell.size),
  )

  def of(loss_fn: training.LossFn) -> Estimate:
    def pair(inputs: tuple[jax.Array, ...]) -> Estimate:
      place, target, behaviour, amount, key = inputs
      problem = jax.tree.map(lambda array: array[place], stacked)
      server_logits = settings.mismatch(policy.logits(problem, behaviour), key, amount)
      return estimate(problem, loss_fn, target, server_logits)

    flat = jax.jit(functools.partial(jax.lax.map, pair))(pairs)
    return jax.tree.map(lambda x: np.asarray(x).reshape(shape).mean(axis=2), flat)

  return {name: of(loss_fn) for name, loss_fn in losses.items()}


def _through_softmax(
  problem: policy.Problem,
  logits_MTPV: jax.Array,
  prompts: jax.Array,
  tokens_BT: jax.Array,
  gradients_BT: jax.Array,
) -> jax.Array:
  """From gradients by the logprobs to those by the weights, trajectory by trajectory: [B, D, V]."""
  length, vocabulary = problem.length, problem.vocabulary
  place = (prompts[:, None], jnp.arange(length), policy.previous(tokens_BT, vocabulary))
  features_BTD = jnp.asarray(problem.features_MTPD)[place]
  residual_BTV = jax.nn.one_hot(tokens_BT, vocabulary) - jax.nn.softmax(logits_MTPV[place])
  return jnp.einsum("bt,btd,btv->bdv", gradients_BT, features_BTD, residual_BTV)


def _ratio(numerator: jax.Array, divisor: jax.Array) -> jax.Array:
  """0 where the divisor is 0."""
  return jnp.where(divisor == 0, 0, numerator / jnp.where(divisor == 0, 1, divisor))
