"""The run files of advantages build; what does not fit is told before anything starts."""

import pathlib

import jax
import pytest

from experiments import rl_run
from intellect3.models import hf, presets, transformer

DEMO = "experiments/configs/runs/demo.gin"
FOLDER = pathlib.Path("experiments/configs/runs/advantages")
FILES = (
  "group_standardised",
  "leave_one_out",
  "length_penalty",
  "mean_normalised",
  "moving_baseline",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A model directory that is whole; nothing here runs it."""
  directory = tmp_path_factory.mktemp("models") / "model"
  config = presets.tiny()
  hf.save(directory, config, transformer.init(config, jax.random.key(0)))
  return directory


@pytest.fixture
def build(model, tmp_path, monkeypatch, capsys):
  """Reads, checks and builds a run as the command does, and starts none of it."""
  built = []
  monkeypatch.setattr(rl_run.process, "run_to_end", lambda start: built.append(start) or 0)

  def call(file, *bindings, extra=()):
    sets = [f"rl.run.model_path={str(model)!r}", *bindings]
    arguments = ["--gin", str(file), *(part for each in sets for part in ("--set", each))]
    for gin in extra:
      arguments += ["--gin", str(gin)]
    code = rl_run.main([*arguments, "--out", str(tmp_path / "run")])
    assert (code == 0) == bool(built) and not (tmp_path / "run").exists()
    return code, capsys.readouterr().err

  return call


def test_every_file_of_the_folder_is_known_here():
  assert sorted(path.stem for path in FOLDER.glob("*.gin")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_run_file_builds_and_opens_with_what_it_is_for(build, name):
  file = FOLDER / f"{name}.gin"
  assert build(file) == (0, "")
  text = file.read_text()
  for word in ("Purpose:", "Cost:", "Result:", "Command:"):
    assert f"\n# {word}" in f"\n{text}"
  assert str(file) in text


@pytest.fixture
def gin(tmp_path):
  """A file that imports what the demo does not name."""
  path = tmp_path / "names.gin"
  path.write_text(
    "from intellect3.losses import advantages\n"
    "from intellect3.rollouts import credit\n"
    "from intellect3.rollouts import token_weights\n"
  )
  return path


ORCHESTRATOR = "orchestrator.orchestrator."


@pytest.mark.parametrize(
  ("bindings", "message"),
  [
    ([f"{ORCHESTRATOR}advantage_fn=3"], "advantage_fn: expected a function of rewards [N] and"),
    (
      [f"{ORCHESTRATOR}advantage_fn=@advantages.moving_baseline"],
      "or a credit.MovingBaseline, got moving_baseline",
    ),
    (
      [f"{ORCHESTRATOR}advantage_fn=@credit.MovingBaseline()", "credit.MovingBaseline.decay=1"],
      "MovingBaseline.decay: expected in [0, 1), got 1",
    ),
    (
      [
        f"{ORCHESTRATOR}advantage_fn=@advantages.group_standardised",
        "advantages.group_standardised.epsilon=0",
      ],
      "got group_standardised: epsilon: expected finite and > 0, got 0",
    ),
    (
      [f"{ORCHESTRATOR}reward_fn=@advantages.length_penalty"],
      "reward_fn: expected a function of rewards [N] and lengths [N], or None, got length_penalty",
    ),
    (
      [f"{ORCHESTRATOR}rollouts_per_prompt=1"],
      "rollouts_per_prompt: expected an integer >= 2 with an advantage_fn that compares",
    ),
    (["worker.worker.token_weights='echo'"], "token_weights: expected a function from a record"),
    (
      ["worker.worker.token_weights=@token_weights.echo", "token_weights.echo.weight='much'"],
      "token_weights: expected a function from a record to float32[T] by component",
    ),
  ],
)
def test_a_misfit_is_told_in_one_line_before_anything_starts(build, gin, bindings, message):
  code, error = build(DEMO, *bindings, extra=[gin])
  assert code == 2 and message in error, error
  assert len(error.strip().splitlines()) == 1


def test_token_weights_build(build, gin):
  for name in ("echo", "imitate"):
    code, error = build(DEMO, f"worker.worker.token_weights=@token_weights.{name}", extra=[gin])
    assert (code, error) == (0, "")
