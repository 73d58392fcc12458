"""The router alone against NumPy in float64: both kinds of scores, groups, bias, replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.models import presets, transformer
from intellect3.models.moe import Router
from tests.models import helpers

T, D = 12, 6


def oracle(config, params, x):
  """The set of experts of each token, and each expert's weight had it been chosen among `given`."""
  logits = x.astype(np.float64) @ np.asarray(params["kernel"], np.float64)
  if config.router_scores == "sigmoid":
    scores = 1 / (1 + np.exp(-logits))
  else:
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  choice = scores + np.asarray(params.get("correction_bias", 0), np.float64)
  size = config.num_experts // config.num_expert_groups
  chosen = []
  for row in choice:
    groups = row.reshape(-1, size)
    best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: config.num_groups_per_token]
    may = [expert for expert in range(len(row)) if expert // size in best]
    may.sort(key=lambda expert: -row[expert])
    chosen.append(may[: config.num_experts_per_token])
  return scores, np.array(chosen)


def weights_of(config, scores, experts):
  weights = np.take_along_axis(scores, experts, axis=1)
  if config.norm_topk_prob:
    weights = weights / weights.sum(axis=1, keepdims=True)
  return weights * config.routed_scaling_factor


def model(**changes):
  family = presets.tiny_qwen3_moe if changes.get("family") == "qwen3_moe" else presets.tiny
  config = family(**{"embed_dim": D, "num_experts": 12, "num_experts_per_token": 3, **changes})
  rng = np.random.default_rng(7)
  params = {"kernel": rng.normal(0, 1, (D, 12)).astype(np.float32)}
  if config.router_bias:
    params["correction_bias"] = rng.normal(0, 0.3, 12).astype(np.float32)
  return config, params, rng.normal(0, 1, (T, D)).astype(np.float32)


def route(config, params, x, replayed=None):
  return Router(config).apply({"params": params}, x, replayed)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"num_expert_groups": 4, "num_groups_per_token": 2},
    {"num_expert_groups": 6, "num_groups_per_token": 2, "num_experts_per_token": 4},
    {"num_expert_groups": 3, "num_groups_per_token": 1, "num_experts_per_token": 1},
    {"family": "qwen3_moe"},
    {"family": "qwen3_moe", "norm_topk_prob": False, "num_experts_per_token": 12},
  ],
  ids=str,
)
def test_choice_and_weights(changes):
  config, params, x = model(**changes)
  choice, weights = route(config, params, x)
  scores, chosen = oracle(config, params, x)
  experts = np.asarray(choice.experts)
  np.testing.assert_array_equal(np.sort(experts, axis=1), np.sort(chosen, axis=1))
  np.testing.assert_allclose(weights, weights_of(config, scores, experts), rtol=1e-5)
  assert choice.agreed is None


def test_groups_close_experts_that_score_higher():
  config, params, x = model(num_expert_groups=4, num_groups_per_token=1)
  open_config, _, _ = model()
  grouped = np.asarray(route(config, params, x)[0].experts)
  free = np.asarray(route(open_config, params, x)[0].experts)
  assert np.any(np.sort(grouped, axis=1) != np.sort(free, axis=1))
  assert np.all(grouped // 3 == grouped[:, :1] // 3)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_replayed_choice_is_taken_and_weighed_by_own_scores(data):
  config, params, x = model(family=data.draw(st.sampled_from(["glm4_moe", "qwen3_moe"])))
  own, own_weights = route(config, params, x)
  draw = st.permutations(range(12)).map(lambda order: order[:3])
  replayed = np.array(data.draw(st.lists(draw, min_size=T, max_size=T)), np.int32)
  kept = np.array(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
  replayed[kept] = -1
  shuffled = data.draw(st.integers(0, T - 1))
  replayed[shuffled] = np.asarray(own.experts)[shuffled][::-1]
  kept[shuffled] = False
  choice, weights = route(config, params, x, jnp.asarray(replayed))
  scores, chosen = oracle(config, params, x)
  expected = np.where(kept[:, None], np.asarray(own.experts), replayed)
  np.testing.assert_array_equal(choice.experts, expected)
  np.testing.assert_allclose(weights, weights_of(config, scores, expected), rtol=1e-5)
  np.testing.assert_array_equal(np.asarray(weights)[kept], np.asarray(own_weights)[kept])
  same = [set(a) == set(b) for a, b in zip(replayed.tolist(), chosen.tolist(), strict=True)]
  np.testing.assert_array_equal(np.asarray(choice.agreed)[~kept], np.array(same)[~kept])


def test_the_bias_gets_no_gradient_and_the_kernel_does_under_replay():
  config, params, x = model()
  replayed = jnp.tile(jnp.array([[11, 0, 5]]), (T, 1))
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(route(config, p, x, replayed)[1])))(params)
  assert not np.any(grads["correction_bias"]) and np.all(
    np.any(grads["kernel"] != 0, axis=0) == np.isin(np.arange(12), [11, 0, 5])
  )


def test_replaying_its_own_choice_changes_no_bit_of_the_model():
  config = helpers.small()
  params = helpers.random_params(config)
  batch = helpers.rows(config, 2, 16)
  apply = jax.jit(
    lambda replayed: transformer.Transformer(config).apply(
      {"params": params}, *batch, routed_experts_LBTA=replayed
    )
  )
  nothing = np.full((2, 2, 16, 2), -1, np.int32)
  own = apply(nothing)
  np.testing.assert_array_equal(
    own.router.experts_LBTA, helpers.forward(config, params, *batch).router.experts_LBTA
  )
  again = apply(np.asarray(own.router.experts_LBTA))
  np.testing.assert_array_equal(again.hidden_BTD, own.hidden_BTD)
  assert np.all(again.router.agreed_LBT) and not np.any(own.router.agreed_LBT)
  others = apply((np.asarray(own.router.experts_LBTA) + 1) % config.num_experts)
  assert np.all(np.any(np.asarray(others.hidden_BTD != own.hidden_BTD), axis=-1))
  # The first MoE layer sees the same in both, so it still knows what it would have chosen.
  assert not np.any(others.router.agreed_LBT[0])
  with pytest.raises(
    ValueError, match=r"routed_experts_LBTA: expected \[2, 2, 16, 2\], got \[2, 2"
  ):
    apply(nothing[..., :1])


def test_the_router_is_computed_in_float32_whatever_the_hardware_likes():
  """GPUs and TPUs round float32 products unless they are told not to; a CPU cannot show that."""
  config, params, x = model(dtype="bfloat16")
  jaxpr = jax.make_jaxpr(lambda x: route(config, params, x)[1])(jnp.asarray(x, jnp.bfloat16))
  (product,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
  assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
  assert {str(operand.aval.dtype) for operand in product.invars} == {"float32"}
