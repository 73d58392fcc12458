"""Continuous integration stops at the first command that fails, the CUDA compiler's among them."""

import os
import pathlib
import subprocess

import pytest

RUN = pathlib.Path(__file__).parents[2] / ".ci" / "run"


@pytest.mark.parametrize(
  ("failing", "without_plan", "code", "made"),
  [
    ("none", "", 0, ["plan", "lint", "test"]),
    ("plan", "", 7, ["plan"]),
    ("lint", "", 7, ["plan", "lint"]),
    ("plan", "1", 0, ["lint", "test"]),
  ],
)
def test_what_is_made(tmp_path, failing, without_plan, code, made):
  make = tmp_path / "make"
  make.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/made\n[ "$1" != {failing} ] || exit 7\n')
  make.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  environment = {**os.environ, "PATH": path, "CI_WITHOUT_PLAN": without_plan}
  run = subprocess.run([str(RUN)], env=environment, capture_output=True, text=True)
  assert run.returncode == code, run.stderr
  assert (tmp_path / "made").read_text().split() == made
