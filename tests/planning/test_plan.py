"""Reports, searches and tables: on a small program compiled here, and on made-up reports."""

import dataclasses

import jax
import pytest

from intellect3.losses import policy_gradient
from intellect3.losses.supervised import negative_log_likelihood
from intellect3.models import presets, transformer
from intellect3.planning import (
  hardware,
  plan,
  programs,
  table,
)
from intellect3.planning.job import Job, rows_of
from intellect3.sharding.mesh import make_mesh
from intellect3.training import flops, optimizer


@pytest.fixture(scope="module")
def job():
  return Job(
    model=presets.tiny_qwen3(dtype="bfloat16", remat_policy="full"),
    optimizer=optimizer.adamw(learning_rate=1e-3),
    rl_loss=policy_gradient.masked_importance_loss,
    sft_loss=negative_log_likelihood,
    row_length=32,
    micro_rows=1,
    rows=2,
    trajectory_tokens=16,
    head_chunk_size=32,
  )


@pytest.fixture(scope="module")
def device():
  return hardware.load("cpu")


@pytest.fixture(scope="module")
def compiled(job):
  program = programs.make(job, "rl_step", make_mesh(fsdp=1, devices=jax.devices()[:1]))
  return program, program.lower().compile()


@pytest.fixture(scope="module")
def report(job, compiled, device):
  return plan.report(job, *compiled, device)


def test_state_and_arithmetic_are_counted(job, report):
  """AdamW holds two moments a parameter; six operations a weight and token, and attention's."""
  shapes, _ = transformer.abstract(job.model)
  entries = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  held = {name: round(value * 2**30) for name, value in report["memory"].items()}
  assert held["parameters_gib"] == 4 * entries
  assert 0 <= held["optimizer_gib"] - 8 * entries < 64  # and counts of steps
  # 64 tokens, four trajectories of 16: 136 pairs each; 4 heads of 16.
  weights = flops.active_matmul_params(job.model)
  assert report["flops_per_step"] == 6 * weights * 64 + 12 * 2 * 4 * 16 * 4 * 136
  assert report["fits"] and report["faults"] == []
  assert report["memory"]["peak_gib"] == report["peak_gib"] > report["memory"]["temporaries_gib"]


@pytest.mark.parametrize(
  ("policy", "of_weights", "of_attention"),
  [
    ("none", 0, 0),
    ("full", 1, 1),
    ("offload", 1, 1),
    ("attention", 1, 0),
    ("offload_attention", 1, 0),
    ("dots", 0, 1),
  ],
)
def test_what_is_not_kept_is_computed_again(job, compiled, policy, of_weights, of_attention):
  """The forward pass is a third of forward and backward, and attention is a part of it."""
  program = compiled[0]._replace(config=dataclasses.replace(job.model, remat_policy=policy))
  weights = 6.0 * flops.active_matmul_params(job.model) * job.tokens
  attention, experts = plan.kernel_flops(job, program.config)
  assert attention > 0 and experts == 0
  again = (of_weights * weights + of_attention * attention) / 3
  assert plan.hardware_flops(job, program) == pytest.approx(weights + attention + again)


def test_predicted_mfu_is_arithmetic_over_time_and_rate(report, device):
  best = report["flops_per_step"] / device.matrix_rate["bf16"]
  assert report["predicted_mfu"] == pytest.approx(best / report["predicted_step_seconds"])


def test_the_layers_inputs_are_the_activations(job, report):
  """With remat_policy full, two layers keep 1 x 32 tokens of width 64 in bfloat16 each."""
  least = 2 * 32 * 64 * 2
  assert least <= report["memory"]["activations_gib"] * 2**30 <= 2 * least  # XLA's CPU may widen


def test_what_does_not_fit_says_what_to_change(job, compiled, device):
  peak = plan.report(job, *compiled, device)["peak_gib"] * 2**30
  small = dataclasses.replace(device, memory=int(peak))
  report = plan.report(job, *compiled, small, margin=0.1)
  assert not report["fits"]
  assert "more than the" in report["faults"][0] and "GiB that are usable" in report["faults"][0]
  assert any("more devices on fsdp (now 1)" in line for line in report["advice"])
  assert plan.report(job, *compiled, small, margin=0.0)["fits"]


def test_a_table_says_all_of_it(job, report, device):
  row = {
    "kind": "all-gather",
    "dtype": "bf16",
    "axes": ["fsdp"],
    "partial": False,
    "estimated": False,
    "link": "outer",
    "count": 3,
    "bytes": 2e9,
    "wire_bytes": 1e9,
    "seconds": 0.5,
    "exposed_seconds": 0.25,
    "in_unknown_loops": 1,
  }
  one = {**report, "collectives": [row], "compile_seconds": 7.0, "unknown_loops": ["a/while"]}
  whole = {
    "target": "cpu",
    "device_kind": "cpu",
    "devices": 8,
    "mesh": {"data": 1, "fsdp": 8},
    "rows": 2,
    "row_length": 32,
    "micro_rows": 1,
    "programs": {"rl_step": one},
    "compile_seconds": 7.0,
    "compile_peak_rss_gib": 1.5,
    "fits": False,
    "faults": ["rl_step: too much"],
    "advice": ["more devices"],
  }
  text = table.table(whole)
  assert text.startswith("8 x cpu (cpu), fsdp 8: 2 rows of 32 tokens a step, 1 at once")
  assert table.CPU_NOTE in text and "DOES NOT FIT" in text
  assert f"rl_step: {report['predicted_step_seconds']:.3f}+ s, " in text
  assert "fault: rl_step: too much" in text and "advice: more devices" in text
  line = next(line for line in text.splitlines() if "all-gather" in line)
  times = ["0.5000", "0.2500", "0.2500"]
  assert line.split() == ["all-gather", "bf16", "fsdp", "outer", "3+", "2.000", *times]


@pytest.mark.parametrize(
  ("changes", "options", "message"),
  [
    ({"names": ["logprobs", "sft"]}, {}, "program: expected one of .* got 'sft'"),
    ({"options": {"nonsense": True}}, {}, "--xla: INVALID_ARGUMENT: No such .* 'nonsense'"),
    ({}, {"mesh": {"fsdp": 3}}, "mesh: expected 3 devices for"),
  ],
)
def test_what_cannot_be_compiled_is_refused_before_it_is_traced(
  job, device, changes, options, message, monkeypatch
):
  monkeypatch.setattr(programs, "make", lambda *_: pytest.fail("too late"))
  with pytest.raises(ValueError, match=message):
    plan.plan(dataclasses.replace(job, **options), jax.devices()[:1], device, **changes)


def test_a_devices_memory_adds_up(report):
  """Parameters, moments and batch are arguments; what layers keep is among the temporaries."""
  memory = report["memory"]
  terms = ("arguments", "outputs", "temporaries", "reference")
  assert memory["peak_gib"] == pytest.approx(sum(memory[f"{name}_gib"] for name in terms))
  assert memory["activations_gib"] <= memory["temporaries_gib"]
  inside = sum(memory[f"{name}_gib"] for name in ("parameters", "optimizer", "batch"))
  assert inside == pytest.approx(memory["arguments_gib"], abs=1e-5)
  shown = dict.fromkeys(memory, 0.0) | {
    "peak_gib": 9.5,
    "arguments_gib": 3.5,
    "parameters_gib": 2.0,
    "optimizer_gib": 1.5,
    "temporaries_gib": 5.0,
    "activations_gib": 4.0,
    "reference_gib": 1.0,
    "host_gib": 7.0,
  }
  assert table.held(shown) == (
    "peak 9.50 GiB = arguments 3.50 (of it parameters 2.00, optimizer 1.50) + temporaries 5.00 "
    "(of it activations 4.00) + reference 1.00; on its host 7.00"
  )


@pytest.mark.parametrize(
  ("tokens", "counts", "rows"),
  [(100, None, 4), (96, None, 4), (65, None, 4), (64, None, 2), (1, None, 2), (999, (2, 6), 6)],
)
def test_rows_of_a_batch(tokens, counts, rows):
  assert rows_of(tokens, row_length=32, micro_rows=2, row_counts=counts) == rows


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("rows", 3, "rows: expected a multiple of micro_rows = 2, got 3"),
    ("trajectory_tokens", 64, "trajectory_tokens: expected at most row_length = 32, got 64"),
    ("mesh", {"model": 2}, r"mesh: expected axes of .* got \['model'\]"),
    ("row_length", 0, "row_length: expected at least 1, got 0"),
  ],
)
def test_a_bad_job_is_named(job, field, value, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(job, **{"micro_rows": 2, field: value})


def test_hardware_is_read_and_checked(tmp_path):
  assert hardware.load("h200").memory > hardware.load("h100").memory
  with pytest.raises(ValueError, match=r"target: expected one of .* got 'a100'"):
    hardware.load("a100")
  text = hardware.FILE.read_text()
  file = tmp_path / "mine.toml"
  file.write_text(text.replace("link_share = 0.75", "link_share = 1.75", 1))
  with pytest.raises(ValueError, match=r"link_share: expected a share from 0 to 1, got 1.75"):
    hardware.load("h100", file)
  with pytest.raises(ValueError, match=r"hardware: expected a file, got .*none.toml"):
    hardware.load("h100", tmp_path / "none.toml")
  file.write_text("memory =")
  with pytest.raises(ValueError, match=r"hardware: expected TOML, got mine.toml"):
    hardware.load("h100", file)
  file.write_text(text.replace("launch = 3e-6", "lunch = 3e-6", 1))
  with pytest.raises(ValueError, match=r"mine.toml, h100: .*'lunch'"):
    hardware.load("h100", file)
