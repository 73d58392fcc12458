"""Policy-gradient losses over packed trajectories, one file a loss.

Place in the ring: the train step calls one of these on the trainer's logprobs of a micro-batch.
All arrays are [B, T]; rows hold packed trajectories. All share one signature,

    loss, metrics = f(logprobs, inference_logprobs, advantages, loss_mask, *, segment_ids=None,
                      denominator=None, num_sequences=None, aggregate=.., axis_name=None, ...)

with hyperparameters as further keywords; `terms.prepare` says what the common ones mean. With
r = exp(logprobs - inference_logprobs), A the advantage and sg the stopped gradient, a token adds

    reinforce                - A logprobs
    masked_importance        - keep r A                       IcePop, INTELLECT-3
    truncated_importance     - sg(min(r, c)) A logprobs       TIS
    cispo                    - sg(clip(r)) A logprobs         CISPO, MiniMax-M1
    clipped                  - min(r A, clip(r) A)            PPO
    probability_difference   - keep r A + tau log(r)^2        DPPO-binary, prime-rl
    sequence_ratio           - min(s A, clip(s) A)            GSPO; s a trajectory's mean ratio
    geometric_masked         - keep r A                       kept by s

The objective is the negative of it: all are minimised. Which to choose: docs/algorithms.md.
"""

from intellect3.losses.policy_gradient.cispo import cispo_loss
from intellect3.losses.policy_gradient.clipped import clipped_loss
from intellect3.losses.policy_gradient.geometric_masked import geometric_masked_loss
from intellect3.losses.policy_gradient.masked_importance import masked_importance_loss
from intellect3.losses.policy_gradient.probability_difference import probability_difference_loss
from intellect3.losses.policy_gradient.reinforce import reinforce_loss
from intellect3.losses.policy_gradient.sequence_ratio import sequence_ratio_loss
from intellect3.losses.policy_gradient.truncated_importance import truncated_importance_loss

__all__ = [
  "cispo_loss",
  "clipped_loss",
  "geometric_masked_loss",
  "masked_importance_loss",
  "probability_difference_loss",
  "reinforce_loss",
  "sequence_ratio_loss",
  "truncated_importance_loss",
]
