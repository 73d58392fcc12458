"""A policy so small that every expectation over its trajectories is a finite sum.

Place in the ring: in the lab, the problem of its exact half. There are a few prompts; a trajectory
is one of all `V ** T` token sequences. The policy is a softmax over features of (prompt, position,
previous token) with shared weights, so that tokens depend on those before them, a trajectory's
ratio is not its tokens' one by one, and what is learnt at one place changes all others. There are
fewer weights than places: the policy cannot fit all prompts and does not become deterministic.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_TRAJECTORIES = 50_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
  """Prompts, features, and a reward for every sequence after every prompt; a pytree.

  Attributes:
    sequences_ST: int32 [S, T], all sequences of the vocabulary V, S = V ** T.
    rewards_MS: float32 [M, S], of each sequence after each of the M prompts, in [0, 1].
    features_MTPD: float32 [M, T, V + 1, D], by prompt, position and previous token; the previous
      token V stands for the trajectory's start.
  """

  sequences_ST: Any
  rewards_MS: Any
  features_MTPD: Any

  @property
  def prompts(self) -> int:
    return self.features_MTPD.shape[0]

  @property
  def length(self) -> int:
    return self.features_MTPD.shape[1]

  @property
  def vocabulary(self) -> int:
    return self.features_MTPD.shape[2] - 1


def make_problem(
  *,
  prompts: int = 8,
  vocabulary: int = 4,
  length: int = 4,
  features: int = 24,
  solved_share: float = 0.1,
  seed: int = 0,
) -> Problem:
  """A problem with verifiable rewards: a sequence is right (1) or wrong (0).

  After each prompt a sequence has a score, the sum of standard normal numbers by position, previous
  token and token; the best `solved_share` of the sequences are right. Features are normal with
  variance 1 / D. The seed fixes both.

  Args:
    prompts: M >= 1.
    vocabulary: V >= 2.
    length: T >= 1.
    features: D >= 1; there are D V weights for M (1 + (T - 1) V) places.
    solved_share: in (0, 1); about the return of the uniform policy, with which training begins.
    seed: of scores and features.

  Raises:
    ValueError: where an argument is out of its range, or there are more than 50,000 trajectories.
  """
  least = {"prompts": (prompts, 1), "vocabulary": (vocabulary, 2), "length": (length, 1)}
  for name, (value, bound) in (least | {"features": (features, 1)}).items():
    if value < bound:
      raise ValueError(f"{name}: expected at least {bound}, got {value}")
  if not 0 < solved_share < 1:
    raise ValueError(f"solved_share: expected a number in (0, 1), got {solved_share}")
  if prompts * vocabulary**length > MAX_TRAJECTORIES:
    raise ValueError(
      f"prompts, vocabulary, length: expected at most {MAX_TRAJECTORIES} trajectories, since all "
      f"are enumerated, got {prompts * vocabulary**length}"
    )
  random = np.random.default_rng(seed)
  grid = np.indices((vocabulary,) * length).reshape(length, -1).T.astype(np.int32)
  scores = random.normal(size=(prompts, length, vocabulary + 1, vocabulary))
  total_MS = scores[:, np.arange(length), _previous(grid, vocabulary, np), grid].sum(axis=2)
  threshold_M1 = np.quantile(total_MS, 1 - solved_share, axis=1, keepdims=True)
  shape = (prompts, length, vocabulary + 1, features)
  features_MTPD = random.normal(size=shape) / np.sqrt(features)
  rewards_MS = (total_MS > threshold_M1).astype(np.float32)
  return Problem(grid, rewards_MS, features_MTPD.astype(np.float32))


def make_problems(count: int, **shape: Any) -> list[Problem]:
  """Problems of one shape with the seeds 0 to `count` - 1: what an experiment is repeated over.

  Raises:
    ValueError: where the count is below 1, or as `make_problem`.
  """
  if count < 1:
    raise ValueError(f"count: expected at least 1, got {count}")
  return [make_problem(**shape, seed=seed) for seed in range(count)]


def stack(problems: Sequence[Problem]) -> Problem:
  """All problems in one whose arrays have them as a further first axis, for `jax.vmap`.

  Raises:
    ValueError: where there is none, or their shapes differ.
  """
  shapes = {problem.features_MTPD.shape for problem in problems}
  if len(shapes) != 1:
    raise ValueError(f"problems: expected problems of one shape, got {sorted(shapes) or 'none'}")
  return jax.tree.map(lambda *arrays: jnp.stack(arrays), *problems)


def initial(problem: Problem) -> jax.Array:
  """The weights of the uniform policy: float32 [D, V], all 0."""
  return jnp.zeros((problem.features_MTPD.shape[-1], problem.vocabulary), jnp.float32)


def logits(problem: Problem, weights_DV: jax.Array) -> jax.Array:
  """The logits at every place, [M, T, V + 1, V]."""
  return jnp.asarray(problem.features_MTPD) @ weights_DV


def logprobs(logits_MTPV: jax.Array, prompts_B: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """The logprob of each token given the prompt and the tokens before it, [B, T], in nats."""
  length, vocabulary = logits_MTPV.shape[1], logits_MTPV.shape[-1]
  table = jax.nn.log_softmax(logits_MTPV, axis=-1)
  before_BT = previous(tokens_BT, vocabulary)
  return table[prompts_B[:, None], jnp.arange(length), before_BT, tokens_BT]


def every_trajectory(problem: Problem) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Prompts [M S], tokens [M S, T] and rewards [M S] of all trajectories."""
  count = problem.sequences_ST.shape[0]
  prompts = jnp.repeat(jnp.arange(problem.prompts), count)
  tokens = jnp.tile(jnp.asarray(problem.sequences_ST), (problem.prompts, 1))
  return prompts, tokens, jnp.asarray(problem.rewards_MS).ravel()


def probabilities(problem: Problem, logits_MTPV: jax.Array) -> jax.Array:
  """The probability of every trajectory, [M S], prompts being equally likely; sums to 1."""
  prompts, tokens, _ = every_trajectory(problem)
  return jnp.exp(jnp.sum(logprobs(logits_MTPV, prompts, tokens), axis=1)) / problem.prompts


def expected_return(problem: Problem, weights_DV: jax.Array) -> jax.Array:
  """J, the expected reward: exact and differentiable."""
  return jnp.sum(
    probabilities(problem, logits(problem, weights_DV)) * jnp.asarray(problem.rewards_MS).ravel()
  )


def entropy(problem: Problem, weights_DV: jax.Array) -> jax.Array:
  """The mean over prompts of a trajectory's entropy, in nats."""
  probability = probabilities(problem, logits(problem, weights_DV)) * problem.prompts
  return -jnp.sum(jax.scipy.special.xlogy(probability, probability)) / problem.prompts


def sample(logits_MTPV: jax.Array, prompts_B: jax.Array, key: jax.Array) -> jax.Array:
  """One trajectory per given prompt, int32 [B, T], token by token."""
  length, vocabulary = logits_MTPV.shape[1], logits_MTPV.shape[-1]

  def token(previous_B: jax.Array, step: tuple[jax.Array, jax.Array]):
    logits_MPV, key = step
    token_B = jax.random.categorical(key, logits_MPV[prompts_B, previous_B]).astype(jnp.int32)
    return token_B, token_B

  start_B = jnp.full(prompts_B.shape, vocabulary, jnp.int32)
  steps = (jnp.swapaxes(logits_MTPV, 0, 1), jax.random.split(key, length))
  return jax.lax.scan(token, start_B, steps)[1].T


def reward(problem: Problem, prompts_B: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """The reward of each trajectory, [B]."""
  places = problem.vocabulary ** np.arange(problem.length)[::-1]
  return jnp.asarray(problem.rewards_MS)[prompts_B, jnp.sum(tokens_BT * places, axis=1)]


def previous(tokens_BT: jax.Array, vocabulary: int) -> jax.Array:
  """The token before each, [B, T]; `vocabulary` before the first."""
  return _previous(tokens_BT, vocabulary, jnp)


def _previous(tokens_BT, vocabulary: int, xp):
  start_B1 = xp.full_like(tokens_BT[:, :1], vocabulary)
  return xp.concatenate([start_B1, tokens_BT[:, :-1]], axis=1)
