"""The aux-loss-free update of the router's bias: one step by hand, and balance over many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_batches import pack, records

from intellect3.losses import policy_gradient
from intellect3.models import presets, transformer
from intellect3.training import optimizer, router_bias, state, step

CONFIG = presets.tiny(
  embed_dim=16, head_dim=4, mlp_dim=24, expert_mlp_dim=8, vocab_size=32, expert_block_size=8
)
MADE = records([8, 5, 7, 3, 4, 6, 8, 3])
BATCH = pack(MADE, ((6, 3), (0, 1), (5, 2), (7, 4)), row_length=16, row_count=4)


RATE = 0.02
ADAM = optimizer.adamw(learning_rate=1e-6)


def train_step(rate, config=CONFIG):
  loss_fn = policy_gradient.masked_importance_loss
  return step.make_train_step(
    config, loss_fn, ADAM, micro_rows=2, head_chunk_size=16, router_bias_rate=rate
  )


def start(config=CONFIG):
  return state.create(transformer.init(config, jax.random.key(0)), ADAM)


def bias_of(made):
  return np.asarray(made.params["moe_layers"]["moe"]["router"]["correction_bias"])


def test_one_update_by_hand():
  params = {
    "router": {
      "correction_bias": jnp.asarray([[0.5, -0.25, 0.0, 0.125], [0.0, 0.0, 0.0, 0.0]]),
      "kernel": jnp.ones((3, 4)),
    }
  }
  # Means 5 and 2: above it goes down, below it up, at it nothing moves.
  load_LE = jnp.asarray([[5.0, 9.0, 0.0, 6.0], [2.0, 2.0, 2.0, 2.0]])
  after = router_bias.update(params, load_LE, 0.125)
  expected = [[0.5, -0.375, 0.125, 0.0], [0.0, 0.0, 0.0, 0.0]]
  assert after["router"]["correction_bias"].tolist() == expected
  assert after["router"]["correction_bias"].dtype == jnp.float32
  np.testing.assert_array_equal(after["router"]["kernel"], params["router"]["kernel"])


@pytest.fixture(scope="module")
def compiled():
  return jax.jit(train_step(RATE))


def test_a_steps_update_is_by_its_whole_load(compiled):
  """That it is frozen without, to the last bit, is in test_step.py."""
  fresh = start()
  after, metrics = compiled(fresh, BATCH)
  load_LE = np.asarray(metrics["expert_load_LE"])  # of both micro-batches
  assert load_LE.sum() == 2 * sum(len(record.trajectory.tokens) for record in MADE)
  by_hand = bias_of(fresh) + np.float32(RATE) * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
  np.testing.assert_array_equal(bias_of(after), by_hand)


def test_an_uneven_router_is_balanced_over_steps(compiled):
  made = start()
  router = made.params["moe_layers"]["moe"]["router"]
  router["correction_bias"] = jnp.asarray([[0.6, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
  violations = []
  for _ in range(40):
    made, metrics = compiled(made, BATCH)
    violations.append(float(metrics["max_violation"]))
  assert violations[0] == 3.0  # two of eight experts get everything
  assert max(violations[-5:]) < 0.7


@pytest.mark.parametrize(
  ("config", "rate", "named"),
  [
    (CONFIG, -0.1, "at least 0, got -0.1"),
    (CONFIG, float("nan"), "at least 0, got nan"),
    (presets.tiny_qwen3_moe(), 0.001, r"no router bias \(qwen3_moe\), got 0.001"),
    (presets.tiny_qwen3(), 0.001, r"no experts \(qwen3\), got 0.001"),
  ],
)
def test_what_has_no_bias_to_update_is_refused(config, rate, named):
  with pytest.raises(ValueError, match=f"router_bias_rate: expected .*{named}"):
    train_step(rate, config)


def test_a_dense_model_trains_through_the_same_step():
  config = presets.tiny_qwen3(
    embed_dim=16, head_dim=4, mlp_dim=24, vocab_size=32, num_layers=1, num_dense_layers=1
  )
  fresh = start(config)
  after, metrics = jax.jit(train_step(0.0, config))(fresh, BATCH)
  assert not [name for name in metrics if "expert" in name or "violation" in name]
  assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0.0
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, fresh.params)
  assert all(value > 0.0 for value in jax.tree.leaves(moved))
