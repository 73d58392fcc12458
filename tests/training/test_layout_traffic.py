"""What travels in a step of GLM-4.5-Air's size, read off its trace: nothing is compiled or run."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from intellect3.losses.policy_gradient import masked_importance_loss
from intellect3.models import presets, transformer
from intellect3.pipeline import packing
from intellect3.sharding import rules
from intellect3.sharding.mesh import AXES
from intellect3.training import step

LENGTH = 4096
CONFIG = dataclasses.replace(
  presets.glm_4_5_air(attention="blockwise", grouped_matmul="blocked", expert_exchange="padded"),
  num_layers=4,
)
EXPERT_STACK = 128 * 4096 * 1408


class Sent(NamedTuple):
  """One collective: its name, mesh axes, operand, and whether a loop repeats it."""

  name: str
  axes: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: str
  repeated: bool


def collectives(jaxpr, repeated=False) -> Iterator[Sent]:
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    axes = equation.params.get("axes", equation.params.get("axis_name"))
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    if axes and isinstance(axes[0], str) and name not in ("axis_index", "axis_size"):
      for operand in equation.invars:
        yield Sent(name, axes, operand.aval.shape, str(operand.aval.dtype), repeated)
    inner = repeated or name in ("scan", "while")
    for value in equation.params.values():
      for one in value if isinstance(value, tuple | list) else (value,):
        body = getattr(one, "jaxpr", one)
        if hasattr(body, "eqns"):
          yield from collectives(body, inner)


def batch(rows):
  def array(dtype):
    return jax.ShapeDtypeStruct((rows, LENGTH), dtype)

  count = jax.ShapeDtypeStruct((), np.int32)
  whole, real = array(np.int32), array(np.float32)
  return packing.Batch(
    tokens=whole,
    loss_mask=array(np.bool_),
    inference_logprobs=real,
    advantages=real,
    temperature=real,
    policy_versions=whole,
    segment_ids=whole,
    positions=whole,
    step=count,
    loss_tokens=count,
    loss_sequences=count,
  )


def sent(sizes, table, *, micro_batches=2):
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  rows = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1)
  gradient = step.make_gradient_fn(
    CONFIG, masked_importance_loss, micro_rows=rows, head_chunk_size=256
  )
  params = transformer.abstract(CONFIG)[0]
  with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(table):
    traced = jax.make_jaxpr(gradient)(params, batch(micro_batches * rows))
  return list(collectives(traced.jaxpr))


@pytest.fixture(scope="module")
def hybrid():
  return sent({"data": 2, "fsdp": 8, "expert": 8}, rules.TRAIN_FSDP_EXPERT)


def test_replicas_sum_their_gradients_once_a_step(hybrid):
  over_data = [one for one in hybrid if "data" in one.axes]
  assert len(over_data) > 20 and not any(one.repeated for one in over_data)


def test_weights_travel_in_bfloat16_layer_by_layer(hybrid):
  gathers = [one for one in hybrid if one.name == "all_gather" and "fsdp" in one.axes]
  assert len(gathers) > 20
  assert {one.dtype for one in gathers} == {"bfloat16"}
  # Embedding, head and one layer at a time: never a stack of layers.
  assert max(np.prod(one.shape) for one in gathers) < EXPERT_STACK


def test_no_experts_are_gathered_over_the_devices_that_divide_them(hybrid):
  travelling = [one for one in hybrid if "expert" in one.axes and one.name == "all_gather"]
  assert travelling and all(one.shape[-2:] != (4096 // 8, 1408) for one in travelling)
  assert not any(one.shape[-2:] == (1408, 4096 // 8) for one in travelling)
  rows = [one for one in hybrid if one.name == "all_to_all" and one.dtype == "bfloat16"]
  assert {one.axes for one in rows} == {("expert",)}
  assert all(one.shape[0] <= CONFIG.expert_receive_rows for one in rows)


def test_gradients_are_summed_in_float32(hybrid):
  scattered = [one for one in hybrid if one.name == "reduce_scatter"]
  # Embedding and head, 7 kernels of a dense layer, 10 of an MoE layer.
  assert len(scattered) == 19 and {one.dtype for one in scattered} == {"float32"}


def test_long_rows_gather_keys_and_values_alone():
  found = sent({"fsdp": 4, "context": 4}, rules.TRAIN_CONTEXT)
  over_context = [one for one in found if one.axes == ("context",) and one.repeated]
  wide = [one for one in over_context if np.prod(one.shape) >= LENGTH // 4 * 128]
  # [1, T / 4, 8 kv heads, 128]: no queries, no hidden states, none in float32 but their gradient.
  assert wide and {one.shape[-2:] for one in wide} == {(8, 128)}
  assert {one.dtype for one in wide if one.name == "all_gather"} == {"bfloat16"}
