"""Which knob is advised, and what it is said to free: on made-up situations."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from intellect3.losses import policy_gradient
from intellect3.models import presets
from intellect3.planning import advice, collectives, hlo, memory, schedule
from intellect3.planning.hardware import GIB
from intellect3.planning.job import Job
from intellect3.sharding.mesh import make_mesh
from intellect3.training import optimizer
from intellect3.training.state import TrainState


def held(**changed):
  sizes = dict.fromkeys(memory.Memory._fields, 0)
  sizes |= {"parameters": 3 * GIB, "optimizer": 3 * GIB, "activations": 24 * GIB}
  sizes |= {"temporaries": 80 * GIB, "peak": 90 * GIB}
  return memory.Memory(**(sizes | changed))


def situation(*, usable=60 * GIB, mesh=None, remat="full", micro_rows=256, **changed):
  """GLM-4.5-Air on 128 devices, 30 GiB too much on each, two rows at a time."""
  sizes = {"data": 1, "fsdp": 16, "expert": 8, "context": 1, "tensor": 1} | (mesh or {})
  job = Job(
    model=presets.glm_4_5_air(remat_policy=remat),
    optimizer=optimizer.muon(learning_rate=1e-6),
    rl_loss=policy_gradient.masked_importance_loss,
    row_length=65536,
    micro_rows=micro_rows,
    rows=4096,
    trajectory_tokens=65536,
  )
  program = types.SimpleNamespace(
    mesh=types.SimpleNamespace(shape=sizes), config=job.model, first={}
  )
  values = {
    "job": job,
    "program": program,
    "held": held(),
    "usable": usable,
    "host_usable": 200 * GIB,
    "line": schedule.Timeline(),
    "seconds": 100.0,
    "buffers": (),
    "travelling": (),
  }
  return advice.Situation(**(values | changed))


def said(found, start):
  return [line for line in advice.advice(found) if line.startswith(start)]


def test_what_fits_needs_nothing():
  found = situation(usable=100 * GIB)
  assert advice.faults(found) == advice.advice(found) == []


def test_every_knob_with_what_it_frees():
  """Two rows a device: one frees half of the temporaries; an expert layer is 128/8 x 3 x 4096 x
  1408 in bfloat16, 0.52 GiB, of which half twice."""
  found = situation()
  lines = advice.advice(found)
  assert advice.faults(found) == ["peak 90.0 GiB: more than the 60.0 GiB that are usable"]
  assert lines[0].startswith("30.0 GiB a device too much")
  assert said(found, "micro_rows 128 (now 256): up to 40.0 GiB")
  assert said(found, "model_options remat_policy 'offload' (now 'full'): 24.0 GiB")
  assert said(found, "context 2 (now 1)")
  assert said(found, "expert 16 (now 8): half of a layer's gathered experts and of their gradient")
  assert not said(found, "more devices")  # 6 of 60 GiB


@pytest.mark.parametrize(
  ("changes", "start", "there"),
  [
    ({"micro_rows": 128}, "micro_rows", False),
    ({"remat": "none"}, "model_options remat_policy 'full' (now 'none')", True),
    ({"remat": "offload"}, "model_options remat_policy", False),
    ({"held": held(parameters=25 * GIB)}, "more devices on fsdp (now 16)", True),
    ({"mesh": {"expert": 128, "fsdp": 1}}, "expert", False),
    ({"mesh": {"context": 16384}}, "context 32768 (now 16384)", True),
    ({"mesh": {"context": 32768}}, "context", False),
  ],
)
def test_a_knob_is_advised_where_it_turns(changes, start, there):
  assert bool(said(situation(**changes), start)) == there


def test_moments_in_float32_are_offered_in_half():
  """A stack of 2^30 moments is 4 GiB a device."""
  mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
  placed = NamedSharding(mesh, PartitionSpec())
  leaf = jax.ShapeDtypeStruct((2**10, 2**20), np.float32, sharding=placed)
  found = situation()
  found.program.first = TrainState(step=None, params={}, opt_state={"momentum": leaf})
  assert said(found, "the optimizer's moments in bfloat16 (optimizer.muon.momentum_dtype): 2.0")


@pytest.mark.parametrize(
  ("source", "knob"),
  [
    ("intellect3/losses/logprobs.py:94", "smaller head_chunk_size (now 256)"),
    ("intellect3/kernels/expert_parallel/experts.py:90", "smaller expert_receive_rows"),
    ("intellect3/training/step.py:10", None),
  ],
)
def test_the_biggest_buffers_point_at_their_knob(source, knob):
  buffer = memory.Buffer(10 * GIB, "f32[8,8]", "fusion", source)
  lines = said(situation(buffers=(buffer,)), "smaller")
  assert lines == ([] if knob is None else [line for line in lines if line.startswith(knob)])
  assert bool(lines) == (knob is not None)


def test_a_host_that_is_full_is_a_fault():
  found = situation(usable=100 * GIB, held=held(host=300 * GIB))
  assert advice.faults(found) == [
    "host 300.0 GiB a device: more than the 200.0 GiB that its host has for it"
  ]
  assert said(found, "less on the host")


def test_weights_in_float32_are_a_fault():
  row = {"weight": "embedding", "count": 2, "bytes": 3 * GIB}
  found = situation(usable=100 * GIB, travelling=[row])
  assert advice.faults(found) == ["float32 weight embedding travels 2 times, 3.00 GiB"]
  assert said(found, "cast parameters")


@pytest.mark.parametrize(("exposed", "there"), [(4.0, False), (6.0, True)])
def test_waiting_is_told_beyond_the_aim(exposed, there):
  """Of 100 seconds; the aim is five."""
  array = (hlo.Shape("bf16", (8,)),)
  one = collectives.Collective("c", "all-gather", array, ((0, 1),), ("fsdp",), False)
  line = schedule.Timeline(events=[schedule.Event(one, 1, exposed, exposed, False, "a/moe/b")])
  lines = said(situation(usable=100 * GIB, line=line), "the step waits for collectives 6%")
  assert bool(lines) == there
  assert not there or lines[0].endswith("all-gather bf16 over fsdp of a/moe/b")
