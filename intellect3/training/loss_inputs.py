"""What the train step hands a loss beyond the four arrays, `segment_ids` and `denominator`.

Place in the ring: between the step and `losses`. A loss that names one of `NAMES` among its
parameters gets it; a loss with the basic signature alone, a user's own say, gets nothing more. So
the step knows no algorithm. What a loss asks for and what a run has are compared by tracing the
loss with its bound hyperparameters on small shapes: nothing is computed, no device is touched.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from intellect3.losses import components

NAMES = (
  "num_sequences",
  "old_logprobs",
  "ref_logprobs",
  "rl_weights",
  "ce_weights",
  "ref_kl_weights",
  "component_denominators",
)
"""What a loss may ask for, by the name of its parameter:

    num_sequences           float32[], the batch's trajectories with a loss-masked token
    old_logprobs            float32[B, T], of the policy that the step starts from (`decoupled`)
    ref_logprobs            float32[B, T], of the reference model
    rl_weights, ce_weights, ref_kl_weights
                            float32[B, T], the log's per-token weights, where it has them
    component_denominators  components.Denominators of float32[], tokens of weight other than 0
"""

WEIGHTS = ("rl_weights", "ce_weights", "ref_kl_weights")
"""Those that the log may hold."""

_OF_A_RUN = {
  "ref_logprobs": "reference_path: expected None",
  "old_logprobs": "decoupled: expected False",
  **dict.fromkeys(WEIGHTS, "token_weights: expected none of that component"),
}
"""What is wrong where a loss does not read what a run gives it."""

_REFUSALS = (ValueError, TypeError, AssertionError)
"""How losses refuse their arguments."""


def declared(loss_fn: Callable[..., Any]) -> frozenset[str]:
  """The names of `NAMES` among a loss's parameters (of the function that a wrapper wraps)."""
  keywords = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  parameters = inspect.signature(loss_fn).parameters
  return frozenset(
    name for name in NAMES if name in parameters and parameters[name].kind in keywords
  )


def select(names: Collection[str], available: Mapping[str, Any]) -> dict[str, Any]:
  """The keyword arguments of a loss that declared `names`: of what is available, None left out."""
  return {name: value for name, value in available.items() if name in names and value is not None}


def counts(batch: Any) -> dict[str, Any]:
  """A batch's global counts as a loss takes them, `denominator` among them; float32 scalars."""
  denominator = batch.loss_tokens.astype(jnp.float32)
  each = batch.component_denominators
  if each is None:
    each = components.Denominators(denominator, denominator, denominator)
  return {
    "denominator": denominator,
    "num_sequences": batch.loss_sequences.astype(jnp.float32),
    "component_denominators": each,
  }


def check(loss_fn: Callable[..., Any], given: Collection[str] = ()) -> None:
  """Compares what a loss asks for with what a run has, and its hyperparameters with their ranges.

  Args:
    loss_fn: the loss, its hyperparameters bound.
    given: names of `NAMES` that it will get beside the counts that every batch has.

  Raises:
    ValueError: the loss does not take what every loss gets, refuses its hyperparameters, gives
      something else than a scalar and a dict of scalars, needs what it will not get, or neither its
      value nor its metrics depend on something of `given`.
  """
  takes: Collection[str] = ()
  try:
    takes = declared(loss_fn)
    read = _read(loss_fn, takes, given)
  except _REFUSALS as error:
    if "ref_logprobs" in set(takes) - set(given) and _accepts(
      loss_fn, takes, [*given, "ref_logprobs"]
    ):
      raise ValueError(
        f"reference_path: expected a model's directory for {_name(loss_fn)}, got None"
      ) from error
    raise ValueError(f"loss_fn: {_name(loss_fn)}: {error}") from error
  for name in sorted(set(given) - read):
    raise ValueError(f"{_OF_A_RUN[name]} for {_name(loss_fn)}, which does not read {name}")


def _read(
  loss_fn: Callable[..., Any], takes: Collection[str], given: Collection[str]
) -> frozenset[str]:
  """Those of `given` that the loss's value or metrics depend on."""
  tokens, scalar = _shape((2, 4)), _shape(())
  four = (tokens, tokens, tokens, _shape((2, 4), jnp.bool_))
  each: Any = (scalar, scalar, scalar)
  always = {"num_sequences": scalar, "component_denominators": components.Denominators(*each)}
  arrays = select(takes, dict.fromkeys(sorted(given), tokens))

  def traced(arrays: Any, four: Any, segment_ids: Any, denominator: Any, more: Any) -> Any:
    found = loss_fn(*four, segment_ids=segment_ids, denominator=denominator, **arrays, **more)
    _check_result(found)
    return found

  jaxpr = jax.make_jaxpr(traced)(
    arrays, four, _shape((2, 4), jnp.int32), scalar, select(takes, always)
  ).jaxpr
  return frozenset(name for name, needed in zip(arrays, _needed(jaxpr), strict=False) if needed)


def _accepts(loss_fn: Callable[..., Any], takes: Collection[str], given: Collection[str]) -> bool:
  try:
    return bool(_read(loss_fn, takes, given))
  except _REFUSALS:
    return False


def _needed(jaxpr: Any) -> list[bool]:
  """Of each input whether an output depends on it."""
  needed = {id(variable) for variable in jaxpr.outvars}
  for equation in reversed(jaxpr.eqns):
    if any(id(variable) in needed for variable in equation.outvars):
      needed.update(id(variable) for variable in equation.invars)
  return [id(variable) in needed for variable in jaxpr.invars]


def _check_result(found: Any) -> None:
  fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)
  if not fits or any(jnp.shape(value) for value in (found[0], *found[1].values())):
    given = jax.tree.map(jnp.shape, found)
    raise ValueError(
      f"expected to return (loss, metrics), a scalar and a dict of them, got {given}"
    )


def _shape(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _name(loss_fn: Callable[..., Any]) -> str:
  inner = getattr(loss_fn, "func", loss_fn)  # of a functools.partial
  return getattr(inner, "__name__", repr(inner))
