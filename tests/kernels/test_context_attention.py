"""Rows shared by several devices: which tokens a rank has, what it computes, and the gradients.

An axis of `vmap` stands for the devices, but where the real ones matter: those are eight fake ones
in a process of their own.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intellect3.kernels.attention import (
  attention,
  blocks,
  blockwise,
  context_attention,
  local_part,
  whole,
)
from tests.kernels import attention_cases as cases

AXIS = "context"


def ranks(function, count, *arrays):
  """What each of the axis' ranks gives, stacked; the arrays are the same for all."""
  return jax.jit(jax.vmap(lambda _: function(*arrays), axis_name=AXIS))(jnp.arange(count))


@pytest.mark.parametrize(
  ("count", "tokens"),
  [
    (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    (2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
    (4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
  ],
)
def test_a_rank_has_an_early_and_a_late_block(count, tokens):
  row = jnp.arange(8)[None]
  parts = ranks(lambda x: local_part(x, AXIS), count, row)
  np.testing.assert_array_equal(parts[:, 0], tokens)
  both = jnp.stack([row, row + 10], axis=-1).repeat(2, axis=0)
  joined = ranks(lambda x: whole(local_part(x, AXIS), AXIS), count, both)
  np.testing.assert_array_equal(joined, np.broadcast_to(both, (count, *both.shape)))


def test_what_ranks_say_of_a_token_is_summed_at_its_owner():
  weight = jnp.arange(1.0, 9.0)[None]

  def share(part):  # rank r says r + 1 times the weight
    return jnp.sum(whole(part, AXIS) * weight) * (1.0 + jax.lax.axis_index(AXIS))

  got = ranks(lambda x: jax.grad(share)(local_part(x, AXIS)), 2, jnp.zeros((1, 8)))
  np.testing.assert_array_equal(got[:, 0], [[3.0, 6.0, 21.0, 24.0], [9.0, 12.0, 15.0, 18.0]])


def test_the_cotangent_of_a_part_lies_at_its_tokens():
  weight = jnp.arange(1.0, 9.0)[None]
  got = ranks(
    jax.grad(lambda x: jnp.sum(local_part(x, AXIS) * local_part(weight, AXIS))), 2, 0 * weight
  )
  np.testing.assert_array_equal(got[:, 0], [[1, 2, 0, 0, 0, 0, 7, 8], [0, 0, 3, 4, 5, 6, 0, 0]])


def test_a_row_that_does_not_divide_is_named():
  expected = r"row_length: expected a multiple of 8 \(two blocks for each of the 4 devices of con"
  with pytest.raises(ValueError, match=rf"{expected}text\), got 12"):
    ranks(lambda x: local_part(x, AXIS), 4, jnp.zeros((1, 12)))
  arguments = cases.packed([[12]], 12, 2, 1, 4)
  q, k, v = (arguments[name][:, :3] for name in cases.FLOATS)
  attend = functools.partial(
    context_attention,
    positions_BS=arguments["kv_positions_BS"],
    segment_ids_BS=arguments["kv_segment_ids_BS"],
    scale=1.0,
    implementation="plain",
    axis_name=AXIS,
  )
  with pytest.raises(ValueError, match=f"{expected}text"):
    ranks(attend, 4, q, k, v)


def visited(lengths, tokens, count, size):
  """Blocks of keys that each rank's blocks of queries visit, forward and in the backward pass."""
  segment_ids, positions = cases.packed_ids(lengths, tokens)

  def rank(*ids):
    visible_BIJ = blocks.visible(
      *(local_part(x, AXIS) for x in ids), *ids, q_block=size, kv_block=size
    )
    layout = blocks.Layout(True, len(lengths), 1)
    spans = layout.spans(visible_BIJ), layout.spans(visible_BIJ.swapaxes(1, 2))
    return [jnp.sum(jnp.maximum(x[..., 1] - x[..., 0], 0)) for x in spans]

  return np.asarray(ranks(rank, count, segment_ids, positions))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_rank_visits_its_share_of_a_long_segment_and_no_more(count):
  whole_row = 64 * 65 // 2
  got = visited([[512]], 512, count, 8)
  np.testing.assert_array_equal(got, np.full((2, count), whole_row // count))


def test_ranks_visit_together_what_one_device_would():
  lengths = [[40, 3, 5, 50, 100, 2, 200], [300, 90], [8] * 50]
  alone = visited(lengths, 512, 1, 8)
  triangles = sum(2 * (n // 8 + 1) ** 2 for row in lengths for n in row)
  assert alone[0, 0] < triangles  # other segments' blocks are skipped
  for count in (2, 4, 8):
    got = visited(lengths, 512, count, 8)
    np.testing.assert_array_equal(np.sum(got, axis=1), alone[:, 0])


def test_no_block_of_queries_lies_in_two_pieces(monkeypatch):
  """Pieces of 48 in blocks of at most 32: cut as one row of 96, the second would lie in both."""
  arguments, seen = cases.packed([[96]], 96, 2, 1, 4), []
  visible = blocks.visible

  def spy(*ids, q_block, kv_block):
    seen.append(q_block)
    return visible(*ids, q_block=q_block, kv_block=kv_block)

  monkeypatch.setattr(blockwise, "plan", lambda *_, **__: blockwise.Plan(32, 32, True))
  monkeypatch.setattr(blocks, "visible", spy)
  starts = jnp.asarray([0, 48])
  jax.eval_shape(
    lambda: attention(**arguments, scale=1.0, implementation="blockwise", q_starts=starts)
  )
  assert seen == [24]
  with pytest.raises(ValueError, match="q_starts: expected pieces that divide 96 queries, got 7"):
    attention(**arguments, scale=1.0, q_starts=jnp.arange(7))


@pytest.fixture(scope="module")
def process():
  here = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, str(here / "context_process.py")],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[1])},
    timeout=280,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  return json.loads(found.stdout.splitlines()[-1])


def test_values_and_gradients_are_those_of_one_device(process):
  assert len(process["errors"]) == 4
  for case, errors in process["errors"].items():
    assert len(errors) == 5
    for name, error in errors.items():
      assert error < 2e-5, (case, name, error)


def test_keys_and_values_travel_in_their_own_dtype(process):
  # k and v are gathered and their gradients scattered; the test itself gathers three gradients.
  assert process["sent"]["2"]["all_gather"] == ["bf16"] * 5
  assert process["sent"]["2"]["reduce_scatter"] == ["bf16"] * 2


def test_on_one_device_nothing_is_sent_and_nothing_moves(process):
  assert process["sent"]["1"] == {"all_gather": [], "reduce_scatter": [], "moves": False}
  assert process["sent"]["2"]["moves"]
