"""The definitions of the losses in float64 NumPy, one trajectory at a time, derivatives by hand.

Place: the witness of `tests/losses`. Written from the papers' equations, and from nothing else.
An oracle sees the trained tokens of one trajectory: `x` the trainer's logprobs, `q` those of the
behaviour policy, `a` the advantages, `at` the logprobs at which everything under a stop-gradient
is taken (the same numbers as `x`; apart only for finite differences). All are float64 [n].
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Terms:
  """What a loss says of one trajectory of n trained tokens.

  Attributes:
    values: [n], the loss of each token, before any mean.
    jacobian: [n, n], `jacobian[t, u]` is the derivative of `values[t]` by `x[u]`.
    out: [n], 1 where a bound cut the token's gradient.
    dropped: [n], 1 where the token went with its whole trajectory.
    own: metrics that only this loss has, [n] each.
  """

  values: np.ndarray
  jacobian: np.ndarray
  out: np.ndarray
  dropped: np.ndarray
  own: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _terms(x, token, dropped=False, **own):
  """Terms of a loss whose tokens do not see each other: `token(t)` gives value, slope, out."""
  rows = [token(t) for t in range(len(x))]
  values, slopes, out = (np.array(column, np.float64) for column in zip(*rows, strict=True))
  own = {name: np.array([rule(t) for t in range(len(x))], float) for name, rule in own.items()}
  return Terms(values, np.diag(slopes), out, np.full(len(x), float(dropped)), own)


def reinforce(x, q, a, *, at):
  """Williams, 1992: the objective is A log pi."""
  return _terms(x, lambda t: (-a[t] * x[t], -a[t], 0))


def masked_importance(x, q, a, *, at, ratio_low=0.5, ratio_high=5.0, sequence_ratio_min=1e-5):
  """IcePop: r A where ratio_low <= r <= ratio_high, and nothing of a trajectory with a tiny r."""
  dropped = any(math.exp(at[t] - q[t]) < sequence_ratio_min for t in range(len(x)))

  def token(t):
    out = not ratio_low <= math.exp(at[t] - q[t]) <= ratio_high
    objective = 0.0 if out or dropped else math.exp(x[t] - q[t]) * a[t]
    return -objective, -objective, out

  return _terms(x, token, dropped)


def truncated_importance(x, q, a, *, at, ratio_max=2.0, old=None):
  """TIS: min(r, ratio_max) A log pi; with old logprobs min(r_old, ratio_max) (pi / pi_old) A."""

  def token(t):
    if old is None:
      weight = min(math.exp(at[t] - q[t]), ratio_max)
      return -weight * a[t] * x[t], -weight * a[t], 0
    value = -min(math.exp(old[t] - q[t]), ratio_max) * math.exp(x[t] - old[t]) * a[t]
    return value, value, 0

  top = at if old is None else old
  return _terms(x, token, truncated_share=lambda t: math.exp(top[t] - q[t]) > ratio_max)


def clipped(x, q, a, *, at, clip_low=0.2, clip_high=0.2, dual_clip=None, old=None,
            behaviour_ratio_max=None):  # fmt: skip
  """PPO: min(r A, clip(r) A), of A < 0 not below dual_clip A; decoupled: weighted by pi_old / q."""

  def token(t):
    weight = 1.0
    if old is not None:
      weight = math.exp(old[t] - q[t])
      if behaviour_ratio_max is not None:
        weight = min(weight, behaviour_ratio_max)
    r = math.exp(x[t] - base[t])
    if high(t):
      return -weight * (1 + clip_high) * a[t], 0.0, 1
    if low(t):
      return -weight * (1 - clip_low) * a[t], 0.0, 1
    if dual(t):
      return -weight * dual_clip * a[t], 0.0, 1
    return -weight * r * a[t], -weight * r * a[t], 0

  base = q if old is None else old
  high = lambda t: a[t] > 0 and math.exp(at[t] - base[t]) > 1 + clip_high  # noqa: E731
  low = lambda t: a[t] < 0 and math.exp(at[t] - base[t]) < 1 - clip_low  # noqa: E731
  dual = lambda t: a[t] < 0 and math.exp(at[t] - base[t]) > (dual_clip or math.inf)  # noqa: E731
  return _terms(
    x, token, masked_high_share=high, masked_low_share=low, masked_dual_share=dual
  )  # fmt: skip


def sequence_ratio(x, q, a, *, at, clip_low=3e-4, clip_high=4e-4, token_level=False, old=None):
  """GSPO: min(s A, clip(s) A), s = (pi(y) / pi_old(y))^(1/n); token: s_t = sg(s) pi / sg(pi).

  A trajectory has one advantage, the mean; in GSPO-token each token has its own.
  """
  n = len(x)
  a = a if token_level else np.full(n, sum(a) / n)
  base = q if old is None else old
  values, jacobian, out = np.zeros(n), np.zeros((n, n)), np.zeros(n)
  s_at = math.exp(sum(at[t] - base[t] for t in range(n)) / n)
  s_now = math.exp(sum(x[t] - base[t] for t in range(n)) / n)
  for t in range(n):
    s = s_at * math.exp(x[t] - at[t]) if token_level else s_now
    if a[t] > 0 and s_at > 1 + clip_high:
      values[t], out[t] = -(1 + clip_high) * a[t], 1
    elif a[t] < 0 and s_at < 1 - clip_low:
      values[t], out[t] = -(1 - clip_low) * a[t], 1
    else:
      values[t] = -s * a[t]
      for u in range(n):
        if token_level:
          jacobian[t, u] = -s * a[t] if u == t else 0.0
        else:
          jacobian[t, u] = -s * a[t] / n
  return Terms(values, jacobian, out, out)


def cispo(x, q, a, *, at, ratio_low=0.0, ratio_high=5.0, old=None):
  """CISPO: clip(r, ratio_low, ratio_high) A log pi, the clipped ratio a constant."""
  base = q if old is None else old

  def token(t):
    weight = min(max(math.exp(at[t] - base[t]), ratio_low), ratio_high)
    return -weight * a[t] * x[t], -weight * a[t], 0

  def truncated(t):
    return not ratio_low <= math.exp(at[t] - base[t]) <= ratio_high

  return _terms(x, token, truncated_share=truncated)


def probability_difference(x, q, a, *, at, difference_low=0.2, difference_high=0.2, kl_tau=1e-3,
                           by_sign=True):  # fmt: skip
  """DPPO-binary: r A unless p - q left its bounds on the side of A; plus kl_tau (log r)^2.

  Not `by_sign` (IPO): on either side, whatever the advantage.
  """

  def high(t):
    return (a[t] > 0 or not by_sign) and math.exp(at[t]) - math.exp(q[t]) > difference_high

  def low(t):
    return (a[t] <= 0 or not by_sign) and math.exp(at[t]) - math.exp(q[t]) < -difference_low

  def token(t):
    out = high(t) or low(t)
    d = x[t] - q[t]
    objective = 0.0 if out else math.exp(d) * a[t]
    return -objective + kl_tau * d * d, -objective + 2 * kl_tau * d, out

  return _terms(
    x, token, masked_high_share=high, masked_low_share=low,
    squared_log_ratio=lambda t: (x[t] - q[t]) ** 2,
  )  # fmt: skip


def geometric_masked(x, q, a, *, at, ratio_low=0.1, ratio_high=10.0, ratio_max=None):
  """r A of trajectories whose geometric mean ratio is in bounds; ratio_max: weights as in TIS."""
  mean = math.exp(sum(at[t] - q[t] for t in range(len(x))) / len(x))
  dropped = not ratio_low <= mean <= ratio_high

  def token(t):
    if dropped:
      return 0.0, 0.0, 0
    if ratio_max is None:
      value = -math.exp(x[t] - q[t]) * a[t]
      return value, value, 0
    weight = min(math.exp(at[t] - q[t]), ratio_max)
    return -weight * a[t] * x[t], -weight * a[t], 0

  return _terms(x, token, dropped)


def reverse_kl(x, q, a, *, at, ref, ratio_max=2.0):
  """The policy gradient of -KL(pi || ref): the advantage of a token is log ref / pi."""

  def token(t):
    slope = -min(math.exp(at[t] - q[t]), ratio_max) * (ref[t] - at[t])
    return slope * x[t], slope, 0

  return _terms(x, token)


def penalty(x, q, a, *, at, ref, estimator="k3"):
  """k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d of d = log pi - log ref; Schulman, 2020."""

  def token(t):
    d = x[t] - ref[t]
    if estimator == "k1":
      return d, 1.0, 0
    if estimator == "k2":
      return d * d / 2, d, 0
    return math.expm1(-d) + d, -math.expm1(-d), 0

  return _terms(x, token)


def negative_log_likelihood(x, q, a, *, at):
  return _terms(x, lambda t: (-x[t], -1.0, 0))
