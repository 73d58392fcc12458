"""Reading gin files: includes, bindings, roles without jax, and errors of one line."""

import pathlib
import subprocess
import sys

import pytest

from experiments import gin_config

RUNS = pathlib.Path("experiments/configs/runs")


def test_includes_are_inlined_and_bindings_come_last(tmp_path):
  (tmp_path / "base.gin").write_text("from a import b\nb.f.x = 1\n")
  (tmp_path / "run.gin").write_text("include 'base.gin'\nfrom c import d\nb.f.x = 2\n")
  text = gin_config.read([str(tmp_path / "run.gin")], ["b.f.x=3"])
  assert text.splitlines() == [
    "from a import b",
    "from c import d",
    "b.f.x = 1",
    "b.f.x = 2",
    "b.f.x=3",
  ]


@pytest.mark.parametrize(
  ("files", "bindings", "message"),
  [
    (["missing.gin"], [], "missing.gin: No such file"),
    ([str(RUNS / "demo.gin")], ["steps"], "--set: expected name.parameter=value, got 'steps'"),
  ],
)
def test_bad_arguments_are_named(files, bindings, message):
  with pytest.raises(gin_config.ConfigError, match=message):
    gin_config.read(files, bindings)


def test_a_file_that_includes_itself_is_refused(tmp_path):
  path = tmp_path / "a.gin"
  path.write_text("include 'a.gin'\n")
  with pytest.raises(gin_config.ConfigError, match="includes itself"):
    gin_config.read([str(path)], [])


def run_python(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_roles_without_jax_parse_the_whole_file_and_never_import_jax():
  result = run_python(
    "import sys\n"
    "from experiments import gin_config\n"
    f"text = gin_config.read([{str(RUNS / 'demo.gin')!r}], [])\n"
    "gin_config.parse(text, without_jax=True)\n"
    "from intellect3 import rl\n"
    "loaded = [n for n in sys.modules if n.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax')]\n"
    "assert sys.modules['jax'] is None and loaded == ['jax'], loaded\n"
    "import gin\n"
    "assert gin.query_parameter('orchestrator.orchestrator.prompts_per_step') == 32\n"
    "from intellect3.rl import trainer\n"
    "try:\n"
    "  trainer.trainer()\n"
    "except RuntimeError as error:\n"
    "  assert 'needs jax' in str(error)\n"
    "else:\n"
    "  raise AssertionError\n"
  )
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
  "file", sorted(str(path) for path in RUNS.glob("*.gin") if path.name != "rl_base.gin")
)
def test_every_run_file_parses_and_says_what_it_is_for(file):
  head = pathlib.Path(file).read_text().split("from __gin__")[0]
  for word in ("Purpose:", "Cost:", "Result:", "Command:"):
    assert word in head, f"{file}: {word}"
  result = run_python(
    "from experiments import gin_config\n"
    f"gin_config.parse(gin_config.read([{file!r}], []), without_jax=False)\n"
  )
  assert result.returncode == 0, result.stderr
