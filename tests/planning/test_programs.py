"""What is planned is what runs: the same functions as the composition roots jit, text for text."""

import jax
import numpy as np
import pytest

from experiments import gin_config
from intellect3 import rl, sft, types
from intellect3.models import hf, presets, transformer
from intellect3.pipeline import packing, placement
from intellect3.planning import programs
from intellect3.rl import reference
from intellect3.sharding.mesh import make_mesh
from intellect3.training import layout
from tools import plan_job

RUNS = "experiments/configs/runs"
REAL_STEP, REAL_SCORING = layout.compile_step, layout.compile_scoring


class Recorded(Exception):
  """Raised where the run would compile: what comes after is no matter here."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "model"
  config = presets.tiny()
  hf.save(directory, config, transformer.init(config, jax.random.key(0)))
  return directory


def recorder(real, calls):
  def record(*arguments):
    calls.append((real(*arguments).jitted, *arguments))
    raise Recorded

  return record


def lowered_text(function, program):
  with jax.set_mesh(program.mesh):
    return function.lower(program.first, program.batch).as_text()


def one_device():
  return make_mesh(fsdp=1, devices=jax.devices()[:1])


@pytest.mark.parametrize(
  "bindings",
  [
    [],
    ["trainer.trainer.decoupled=True", "trainer.trainer.loss_fn=@policy_gradient.clipped_loss"],
    ["trainer.trainer.router_bias_rate=0.001", "rl.run.replay_routed_experts=True"],
  ],
  ids=["demo", "decoupled", "bias_and_replay"],
)
def test_the_rl_step_is_the_one_that_rl_run_jits(bindings, model_path, tmp_path, monkeypatch):
  bound = [f"rl.run.model_path={str(model_path)!r}", *bindings]
  text = gin_config.read([f"{RUNS}/demo.gin"], bound)
  gin_config.parse(text, without_jax=False)
  main = gin_config.call(
    rl.run,
    run_dir=str(tmp_path / "run"),
    role="trainer",
    orchestrator_port=9,
    server_urls=["http://127.0.0.1:10"],
  )
  calls = []
  monkeypatch.setattr(layout, "compile_step", recorder(REAL_STEP, calls))
  with pytest.raises(Recorded):
    main()
  monkeypatch.undo()
  (function, _, shardings, mesh, rules), *_ = calls

  kind, job = plan_job.read(text)
  program = programs.make(job, "rl_step", mesh)
  assert kind == "rl" and rules == job.rules
  assert shardings == jax.tree.map(lambda leaf: leaf.sharding, program.first)
  assert lowered_text(program.function, program) == lowered_text(function, program)


def test_the_sft_step_is_the_one_that_sft_run_jits(tmp_path, monkeypatch):
  text = gin_config.read([f"{RUNS}/demo_sft.gin"], [])
  gin_config.parse(text, without_jax=False)
  start = gin_config.call(sft.run, run_dir=str(tmp_path / "run"))
  calls = []
  monkeypatch.setattr(layout, "compile_step", recorder(REAL_STEP, calls))
  with pytest.raises(Recorded):
    start()
  monkeypatch.undo()
  (function, _, _, mesh, _), *_ = calls

  kind, job = plan_job.read(text)
  program = programs.make(job, "sft_step", mesh)
  assert kind == "sft" and programs.names_of(job) == ("sft_step", "logprobs")
  assert lowered_text(program.function, program) == lowered_text(function, program)


def test_the_scoring_is_the_one_of_the_reference(model_path, monkeypatch):
  path = repr(str(model_path))
  bound = [f"rl.run.model_path={path}", f"trainer.trainer.reference_path={path}"]
  _, job = plan_job.read(gin_config.read([f"{RUNS}/demo.gin"], bound))
  mesh = one_device()
  program = programs.make(job, "logprobs", mesh)

  calls = []
  monkeypatch.setattr(layout, "compile_scoring", recorder(REAL_SCORING, calls))
  with jax.set_mesh(mesh), pytest.raises(Recorded):
    checked = reference.check(
      model_path, job.model, model_path, dtype=None, options={"remat_policy": "none"}
    )
    sizes = {"micro_rows": job.micro_rows, "head_chunk_size": job.head_chunk_size}
    reference.make_scorer(model_path, checked, mesh, job.rules, **sizes)
  monkeypatch.undo()
  assert lowered_text(program.function, program) == lowered_text(calls[0][0], program)


@pytest.mark.parametrize("replay", [False, True], ids=["plain", "replay"])
def test_the_batch_is_as_the_pipeline_places_it(replay, model_path):
  """Packed from a record of three tokens, placed, and compared leaf by leaf."""
  bound = [f"rl.run.model_path={str(model_path)!r}", f"rl.run.replay_routed_experts={replay}"]
  _, job = plan_job.read(gin_config.read([f"{RUNS}/demo.gin"], bound), rows=16)
  router = types.RouterShape(
    num_layers=2, num_dense_layers=1, num_experts=8, num_experts_per_token=2
  )
  record = types.TrajectoryRecord(
    step=1,
    rollout_id=0,
    group_id=0,
    branch=0,
    task_id="t",
    environment="e",
    reward=1.0,
    advantage=1.0,
    trajectory=types.Trajectory(
      tokens=np.asarray([1, 2, 3], np.int32),
      loss_mask=np.asarray([False, True, True]),
      inference_logprobs=np.asarray([0.0, -1.0, -1.0], np.float32),
      policy_versions=np.asarray([-1, 0, 0], np.int32),
      temperature=1.0,
      routed_experts=np.zeros((3, 1, 2), np.uint8) if replay else None,
    ),
  )
  batch = packing.pack(
    {0: record},
    ((0,),),
    row_length=job.row_length,
    row_count=16,
    step=1,
    counts=packing.Counts(loss_tokens=2, loss_sequences=1),
    router=router if replay else None,
  )
  mesh = one_device()
  planned = programs.abstract_batch(job, mesh, job.model)
  describe = lambda leaf: (leaf.shape, str(leaf.dtype), leaf.sharding)  # noqa: E731
  assert jax.tree.map(describe, planned) == jax.tree.map(describe, placement.place(batch, mesh))


def test_an_unknown_program_is_named(model_path):
  bound = [f"rl.run.model_path={str(model_path)!r}"]
  _, job = plan_job.read(gin_config.read([f"{RUNS}/demo.gin"], bound))
  with pytest.raises(ValueError, match=r"program: expected one of \('rl_step', .*got 'step'"):
    programs.make(job, "step", one_device())
