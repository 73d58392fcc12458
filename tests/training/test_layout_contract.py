"""Contract 5: on any mesh the step is that of one device. Each case in a process of its own.

Every pair of mesh axes above 1 appears for one family in the default suite, and for both with the
slow ones.
"""

import os
import pathlib
import subprocess
import sys

import pytest

HYBRID = "train_fsdp_expert:data:fsdp:expert"
LONG = "train_context:data:context:tensor"
LONG_EXPERTS = "train_context:fsdp:expert:context"
WIDE_EXPERTS = "train_fsdp:fsdp:expert:tensor"


def holds(family, *meshes):
  here = pathlib.Path(__file__).parent
  found = subprocess.run(
    [sys.executable, str(here / "contract_process.py"), family, *meshes],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[1])},
    timeout=900,
  )
  assert found.returncode == 0, found.stderr[-3000:]
  assert found.stdout.split() == list(meshes)


def test_three_of_the_axes_at_a_time_for_glm():
  holds("glm4_moe", LONG, LONG_EXPERTS)


def test_three_of_the_axes_at_a_time_for_qwen():
  holds("qwen3_moe", HYBRID, WIDE_EXPERTS)


@pytest.mark.slow
def test_the_other_meshes_of_each_family():
  holds("glm4_moe", HYBRID, WIDE_EXPERTS)
  holds("qwen3_moe", LONG, LONG_EXPERTS)
  holds("glm4_moe", "train_fsdp_expert:expert:context:tensor", "train_fsdp:data:fsdp:tensor")
