"""Each policy-gradient loss by hand: a few tokens whose numbers fit in a head."""

import jax
import numpy as np
import pytest

from intellect3.losses import policy_gradient as pg

LN = np.log


def value(loss_fn, ratios, advantages, *, at=-1.0, **options):
  """(loss, gradient) of one row, undivided, with `logprobs` = `at` and the given ratios."""
  ratios, advantages = np.atleast_2d(ratios).astype(np.float32), np.atleast_2d(advantages)
  logprobs = np.full_like(ratios, at)
  rest = (logprobs - LN(ratios), advantages.astype(np.float32), ratios > 0)
  (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    logprobs, *rest, denominator=1.0, num_sequences=1.0, **options
  )
  return float(loss), np.asarray(gradient)[0], metrics


def close(actual, wanted):
  np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-6)


def test_reinforce():
  loss, gradient, metrics = value(pg.reinforce_loss, [1.0, 7.0], [2.0, -1.0], at=-3.0)
  close(loss, -(2 * -3 + -1 * -3))
  close(gradient, [-2.0, 1.0])
  close(metrics["importance_ratio"], 8.0)
  close(metrics["importance_ratio_squared"], 50.0)
  close(metrics["mismatch_kl"], 7 - 1 - LN(7))


def test_masked_importance():
  loss, gradient, metrics = value(pg.masked_importance_loss, [0.4, 0.6, 4.9, 5.1], [1, 1, -2, 1])
  close(loss, -(0.6 - 2 * 4.9))
  close(gradient, [0, -0.6, 9.8, 0])
  close(metrics["masked_share"], 2)
  loss, gradient, metrics = value(pg.masked_importance_loss, [9e-6, 1.0], [1, 1])
  close(np.array([loss, *gradient]), [0, 0, 0])
  close(metrics["sequence_masked_share"], 2)


def test_the_bounds_of_masked_importance_belong_to_the_kept():
  """Ratios of exactly 1/4 and 4, which float32 has: at the bound a token is kept."""
  options = {"ratio_low": 0.25, "ratio_high": 4.0}
  d = LN(np.float32([[0.25, 4.0, 0.125, 8.0]]))
  ones = np.ones_like(d)
  loss, metrics = pg.masked_importance_loss(d, 0 * d, ones, ones > 0, **options)
  close(loss, -(0.25 + 4.0) / 4)
  close(metrics["masked_share"], 0.5)


def test_truncated_importance():
  loss, gradient, metrics = value(pg.truncated_importance_loss, [0.5, 1.5, 30.0], [1, -1, 2])
  close(gradient, [-0.5, 1.5, -4])
  close(loss, (-0.5 + 1.5 - 4) * -1)  # the gradient times logprobs of -1
  close(metrics["truncated_share"], 1)
  close(metrics["masked_share"], 0)


def test_truncated_importance_with_old_logprobs():
  """r_old = 8, cut to 2; the way from old to the trainer, 1/4, stays a ratio with a gradient."""
  old = np.float32([[-1.0 - LN(0.25)]])
  loss, gradient, _ = value(pg.truncated_importance_loss, [2.0], [1.0], old_logprobs=old)
  close([loss, *gradient], [-2 * 0.25, -2 * 0.25])


def test_clipped():
  ratios = [0.7, 0.7, 1.1, 1.3, 1.3, 9.0]
  loss, gradient, metrics = value(pg.clipped_loss, ratios, [1, -1, 1, 1, -1, -1])
  close(loss, -(0.7 - 0.8 + 1.1 + 1.2 - 1.3 - 9.0))
  close(gradient, [-0.7, 0, -1.1, 0, 1.3, 9.0])
  close(metrics["masked_share"], 2)
  loss, gradient, metrics = value(pg.clipped_loss, ratios, [1, -1, 1, 1, -1, -1], dual_clip=3.0)
  close(loss, -(0.7 - 0.8 + 1.1 + 1.2 - 1.3 - 3.0))
  close(gradient, [-0.7, 0, -1.1, 0, 1.3, 0])
  close(metrics["masked_share"], 3)
  loss, gradient, _ = value(pg.clipped_loss, [1.25, 1.3], [1, 1], clip_high=0.28)
  close([loss, *gradient], [-(1.25 + 1.28), -1.25, 0])


def test_clipped_decoupled():
  """The clip judges exp(logprobs - old) = 1.1 and 2; what old is off by, 5, is a weight."""
  old = np.float32([[-1.0 - LN(1.1), -1.0 - LN(2.0)]])
  loss, gradient, _ = value(pg.clipped_loss, [5.5, 10.0], [1, 1], old_logprobs=old)
  close([loss, *gradient], [-5 * (1.1 + 1.2), -5.5, 0])
  loss, gradient, _ = value(
    pg.clipped_loss, [5.5, 10.0], [1, 1], old_logprobs=old, behaviour_ratio_max=2.0
  )
  close([loss, *gradient], [-2 * (1.1 + 1.2), -2.2, 0])


@pytest.mark.parametrize("token_level", [False, True])
def test_sequence_ratio(token_level):
  """Ratios 1/2 and 8 have the geometric mean 2: both tokens weigh 2, over two tokens."""
  options = {"clip_low": 0.2, "clip_high": 2.0, "token_level": token_level}
  loss, gradient, _ = value(pg.sequence_ratio_loss, [0.5, 8.0], [3.0, 3.0], **options)
  close([loss, *gradient], [-6, -3, -3])
  options["clip_high"] = 0.5
  loss, gradient, metrics = value(pg.sequence_ratio_loss, [0.5, 8.0], [3.0, 3.0], **options)
  close([loss, *gradient], [-4.5, 0, 0])
  close(metrics["masked_share"], 2)
  loss, gradient, _ = value(pg.sequence_ratio_loss, [0.5, 8.0], [-3.0, -3.0], **options)
  close([loss, *gradient], [6, 3, 3])


def test_sequence_ratio_where_tokens_have_advantages_of_their_own():
  """GSPO has one advantage a trajectory, the mean; GSPO-token keeps each token's."""
  options = {"clip_low": 0.5, "clip_high": 2.0}
  _, gradient, _ = value(pg.sequence_ratio_loss, [1.0, 1.0], [1.0, 3.0], **options)
  close(gradient, [-1, -1])
  _, gradient, _ = value(
    pg.sequence_ratio_loss, [1.0, 1.0], [1.0, 3.0], **options, token_level=True
  )
  close(gradient, [-0.5, -1.5])


def test_cispo():
  loss, gradient, metrics = value(pg.cispo_loss, [0.1, 1.0, 50.0], [1, -1, 1])
  close(gradient, [-0.1, 1, -5])
  close(loss, 0.1 - 1 + 5)
  close(metrics["truncated_share"], 1)
  _, gradient, _ = value(pg.cispo_loss, [0.1, 1.0, 50.0], [1, -1, 1], ratio_low=0.5)
  close(gradient, [-0.5, 1, -5])


def test_probability_difference():
  """p = 0.5; q of 0.25 and 0.75 are both more than 0.2 away, each against one sign of A."""
  ratios = np.array([2.0, 2.0, 2 / 3, 2 / 3])
  options = {"at": LN(0.5), "kl_tau": 0.1}
  loss, gradient, metrics = value(pg.probability_difference_loss, ratios, [1, -1, 1, -1], **options)
  squares = 0.1 * np.sum(LN(ratios) ** 2)  # also of what the mask removes
  close(loss, -(-2 + 2 / 3) + squares)
  close(gradient, np.array([0, 2, -2 / 3, 0]) + 0.2 * LN(ratios))
  close(metrics["masked_share"], 2)
  # A rare token: its ratio is 100, but it moved by 1%, so it stays.
  loss, _, metrics = value(pg.probability_difference_loss, [100.0], [1.0], at=LN(0.01), kl_tau=0.0)
  close([loss, metrics["masked_share"]], [-100, 0])


def test_geometric_masked():
  """Means of 2 and 1/16: the second trajectory is out of [0.1, 10], its tokens' ratios are not."""
  segment_ids = np.int32([[1, 1, 2, 2]])
  ratios = [0.5, 8.0, 1 / 16, 1 / 16]
  loss, gradient, metrics = value(
    pg.geometric_masked_loss, ratios, [1, 1, 1, 1], segment_ids=segment_ids
  )
  close([loss, *gradient], [-8.5, -0.5, -8, 0, 0])
  close([metrics["masked_share"], metrics["sequence_masked_share"]], [0, 2])
  loss, gradient, _ = value(
    pg.geometric_masked_loss, ratios, [1, 1, 1, 1], segment_ids=segment_ids, ratio_max=3.0
  )
  close([loss, *gradient], [3.5, -0.5, -3, 0, 0])


def test_an_unmasked_token_does_not_drop_its_trajectory():
  d = np.float32([[-30.0, 0.0, 0.0, 0.0]])
  mask = np.array([[False, True, True, True]])
  ones = np.ones_like(d)
  loss, metrics = pg.masked_importance_loss(d, 0 * d, ones, mask)
  assert metrics["sequence_masked_share"] == 0 and loss == -1
  # Masked in, it takes the whole of its own trajectory, and only that, out.
  ids = np.int32([[1, 1, 2, 2]])
  loss, metrics = pg.masked_importance_loss(d, 0 * d, ones, mask | True, segment_ids=ids)
  close([loss, metrics["sequence_masked_share"]], [-0.5, 0.5])
  loss, metrics = pg.masked_importance_loss(d, 0 * d, ones, mask | True)
  close([loss, metrics["sequence_masked_share"]], [0.0, 1.0])
