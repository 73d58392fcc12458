"""Which layouts are tried, which are compiled, and how they are ranked."""

import dataclasses

import jax
import pytest

from intellect3.losses import policy_gradient
from intellect3.models import presets
from intellect3.planning import bounds, hardware, plan, search, table
from intellect3.planning.job import Job
from intellect3.sharding import rules
from intellect3.sharding.mesh import make_mesh
from intellect3.training import optimizer


@pytest.fixture(scope="module")
def job():
  """Four heads, two kv heads, eight experts."""
  return Job(
    model=presets.tiny(dtype="bfloat16"),
    optimizer=optimizer.adamw(learning_rate=1e-3),
    rl_loss=policy_gradient.masked_importance_loss,
    row_length=64,
    micro_rows=1,
    rows=8,
    trajectory_tokens=64,
  )


@pytest.fixture(scope="module")
def device():
  return hardware.load("h200")


def sizes(**axes):
  return {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | axes


def test_every_product_is_a_layout():
  assert list(search.layouts(6, ("data", "fsdp"))) == [
    {"data": 1, "fsdp": 6},
    {"data": 2, "fsdp": 3},
    {"data": 3, "fsdp": 2},
    {"data": 6, "fsdp": 1},
  ]
  assert len(list(search.layouts(8, ("data", "fsdp", "expert")))) == 10


def test_what_divides_is_a_candidate(job):
  found = search.candidates(job, 4, node=8)
  meshes = {tuple(one.job.mesh.values()) for one in found}
  assert (1, 1, 1, 2, 2) in meshes and (1, 4, 1, 1, 1) in meshes and (1, 1, 4, 1, 1) in meshes
  assert (1, 1, 1, 1, 4) not in meshes  # two kv heads
  assert {one.rules for one in found if one.job.mesh == sizes(fsdp=2, context=2)} == {
    "train_fsdp",
    "train_context",
  }
  assert {one.job.micro_rows for one in found if one.job.mesh == sizes(fsdp=4)} == {4, 8}
  near = search.candidates(job, 4, node=2)
  assert all(one.job.mesh["context"] * one.job.mesh["tensor"] <= 2 for one in near)


def test_a_dense_model_has_no_expert_axis(job):
  dense = dataclasses.replace(job, model=presets.tiny_qwen3())
  assert all(one.job.mesh["expert"] == 1 for one in search.candidates(dense, 4, node=8))


@pytest.mark.parametrize(
  ("axes", "field"),
  [
    ({"tensor": 4}, "num_kv_heads: expected a multiple of 4, got 2"),
    ({"expert": 16}, "num_experts: expected a multiple of 16, got 8"),
    ({"context": 64}, "row_length: expected a multiple of 128, got 64"),
    ({"fsdp": 2}, "micro_rows: expected a multiple of 2, got 1"),
  ],
)
def test_what_does_not_divide_is_named(job, axes, field):
  with pytest.raises(ValueError, match=field):
    bounds.check(job, sizes(**axes))


def test_a_bound_is_below_what_is_compiled(job, device):
  """And counts parameters, two moments and a gradient: 16 bytes an entry of the tiny model."""
  mesh = make_mesh(fsdp=1, devices=jax.devices()[:1])
  one = dataclasses.replace(job, mesh=sizes())
  bound = bounds.maker(job, device)(one, mesh)
  report = plan.plan(one, jax.devices()[:1], device, names=["rl_step"])
  state = report["memory"]["parameters_gib"] * 4 * hardware.GIB
  assert state < bound.bytes < report["peak_gib"] * hardware.GIB


def test_a_split_takes_time_on_its_link(job, device):
  """Experts over two nodes are exchanged over the slow link; twice the rows, twice the work."""
  changes = {"rows": 64, "micro_rows": 16, "row_length": 8192, "mesh": sizes(fsdp=16)}
  large = dataclasses.replace(job, model=presets.qwen3_30b_a3b(), **changes)
  inside = dataclasses.replace(large, mesh=sizes(fsdp=2, expert=8))
  across = dataclasses.replace(large, mesh=sizes(expert=16))
  assert bounds.seconds(inside, device) < bounds.seconds(across, device)
  more = dataclasses.replace(inside, rows=128)
  assert bounds.seconds(more, device) == pytest.approx(2 * bounds.seconds(inside, device))


def search_with(job, device, monkeypatch, *, most=12):
  said = []
  seconds = {1: 3.0, 2: 1.0, 4: 2.0}  # by the size of `data`; 2 does not fit

  def fake(candidate, devices, hardware, *, options, **others):
    assert options == {"xla_a": 1}
    data = candidate.mesh["data"]
    if candidate.micro_rows == 8:
      raise ValueError("params: expected embed to divide\nmore")
    return {
      "fits": data != 2,
      "faults": [],
      "peak_gib": 1.0,
      "predicted_mfu": 0.5,
      "predicted_step_seconds": seconds[data],
      "limited_by": "matrix",
      "unknown_loops": ["a/while"],
      "exposed_share": 0.25,
      "mesh": candidate.mesh,
    }

  def bound(candidate, mesh):
    if candidate.mesh["fsdp"] == 2 and candidate.micro_rows == 8:
      return bounds.Bound(1e15, 1.0)
    return bounds.Bound(1e9, float(candidate.mesh["data"]))

  def only(job, devices, node):
    every = real(job, devices, node=node)
    return [one for one in every if one.job.mesh["data"] * one.job.mesh["fsdp"] == 4]

  real = search.candidates
  monkeypatch.setattr(plan, "plan", fake)
  monkeypatch.setattr(plan, "check_options", lambda options, device: said.append(options))
  monkeypatch.setattr(search, "make_mesh", lambda **sizes: None)
  monkeypatch.setattr(search, "candidates", only)
  monkeypatch.setattr(bounds, "maker", lambda job, hardware: bound)
  found = search.search(
    job, [None] * 4, device, program="rl_step", most=most, say=said.append, options={"xla_a": 1}
  )
  return found, said


def test_a_search_ranks_what_fits_first(job, device, monkeypatch):
  found, said = search_with(job, device, monkeypatch)
  order = [(row["mesh"]["data"], row["micro_rows"]) for row in found["ranking"]]
  assert order[:4] == [(4, 4), (1, 4), (2, 4), (2, 8)]
  assert found["ranking"][3]["skipped"] == "holds more at the least"
  assert found["ranking"][4]["error"] == "params: expected embed to divide more"
  assert found["mesh"] == sizes(data=4) and found["rules"] == "train_fsdp"
  assert said[:4] == [
    {"xla_a": 1},
    "6 layouts divide 4 devices; bounding them",
    "5 can fit; compiling 5",
    "layout 1: fsdp 4, train_fsdp, micro_rows 4",
  ]


def test_no_more_than_asked_are_compiled(job, device, monkeypatch):
  found, _ = search_with(job, device, monkeypatch, most=1)
  compiled = [row for row in found["ranking"] if "peak_gib" in row]
  assert [row["mesh"]["fsdp"] for row in compiled] == [4]  # the most promising by its bound
  assert found["ranking"][1]["skipped"] == "others are more promising"


def test_a_ranking_shows_all_of_it(job, device, monkeypatch):
  found, _ = search_with(job, device, monkeypatch)
  monkeypatch.setattr(table, "table", lambda report: "its plan")
  lines = table.ranking(found).splitlines()
  assert lines[1].split() == [
    "data",
    "4",
    "train_fsdp",
    "4",
    "1.0",
    "yes",
    "2.00+",
    "50.0%",
    "25%",
    "matrix",
  ]
  refused = sum("error" in row for row in found["ranking"])
  assert lines[4:6] == [
    "1 layouts not compiled: holds more at the least",
    f"{refused} layouts refused, the first: params: expected embed to divide more",
  ]
  assert lines[-1] == "its plan"


def test_tables_are_those_of_the_run_files():
  assert {name: getattr(rules, name)() for name in search.TABLES} == search.TABLES


def test_every_mesh_has_a_turn_before_any_has_two(job):
  def one(fsdp, micro_rows, seconds):
    changed = dataclasses.replace(job, mesh=sizes(fsdp=fsdp), micro_rows=micro_rows)
    return bounds.Bound(1.0, seconds), search.Candidate(changed, "train_fsdp")

  given = [one(4, 4, 2.0), one(4, 8, 1.0), one(2, 2, 3.0), one(1, 1, 2.5)]
  order = [search._by_promise(given)[place][0].seconds for place in range(4)]
  assert order == [1.0, 2.5, 3.0, 2.0]
