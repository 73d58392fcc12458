"""Importing losses or sharding loads nothing else of ours; advantages does not load jax."""

import json
import subprocess
import sys

import pytest

LOSSES = ("policy_gradient", "importance", "aggregation", "logprobs", "supervised", "advantages")


def modules_after(statement):
  code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return json.loads(run.stdout)


@pytest.mark.parametrize(
  ("statement", "package"),
  [
    ("from intellect3.losses import " + ", ".join(LOSSES), "intellect3.losses"),
    ("from intellect3.sharding import mesh, rules, specs", "intellect3.sharding"),
    (
      "from intellect3.kernels import attention, dispatch, grouped_matmul",
      "intellect3.kernels",
    ),
  ],
)
def test_nothing_else_of_ours(statement, package):
  ours = [name for name in modules_after(statement) if name.startswith("intellect3.")]
  assert ours and all(name == package or name.startswith(package + ".") for name in ours)


@pytest.mark.parametrize(
  "statement", ["import intellect3.losses", "from intellect3.losses import advantages"]
)
def test_without_jax_or_numpy(statement):
  loaded = {name.split(".")[0] for name in modules_after(statement)}
  assert "intellect3" in loaded and not loaded & {"jax", "jaxlib", "flax", "numpy"}
