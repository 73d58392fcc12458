"""Constants measured on the devices at hand, and written where a plan reads them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from intellect3.planning import hardware
from tools import calibrate_plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["--embed", "64", "--mlp", "32", "--tokens", "64", "--dtype", "float32", "--mib", "1"]


def test_two_devices_are_measured_and_the_file_is_read_back(tmp_path):
  out, base = tmp_path / "mine.toml", tmp_path / "base.toml"
  text = hardware.FILE.read_text()
  for number in ("matrix_rate = { bf16 = 1e11, f16 = 1e11, f32 = ", "memory_rate = ", "inner = "):
    head, tail = text.rsplit(number, 1)
    text = head + number + "7e15" + tail[tail.index("\n" if "{" not in number else " }") :]
  base.write_text(text)  # a machine that no measurement comes near
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
  arguments = ["--name", "cpu", "--out", str(out), "--base", str(base), "--repeats", "3"]
  arguments += SMALL
  result = subprocess.run(
    [sys.executable, "-m", "tools.calibrate_plan", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  told = json.loads(result.stdout)
  assert told["devices"] == 2 and told["left"] == ["host", "kernel_share", "latency", "outer"]
  known, new = hardware.load("cpu", base), hardware.load("cpu", out)
  rates = told["rates"]
  for share, reached, rate in (
    ("matrix_share", rates["matrix"], known.matrix_rate["f32"]),
    ("memory_share", rates["memory"], known.memory_rate),
    ("link_share", min(rates["all_gather"], rates["all_to_all"]), known.inner),
  ):
    assert 0 < getattr(new, share) < 1 and rate == 7e15
    assert getattr(new, share) == pytest.approx(reached / rate, rel=1e-4)
  assert told["beyond"] == {}
  assert new.launch == pytest.approx(rates["launch"], rel=1e-4)
  assert (new.memory, new.inner) == (known.memory, known.inner)
  assert hardware.load("h100", out) == hardware.load("h100")


def test_only_the_named_table_changes():
  text = hardware.FILE.read_text()
  new = calibrate_plan.changed(text, "h200", {"matrix_share": 0.123456789})
  differ = [
    pair for pair in zip(text.splitlines(), new.splitlines(), strict=True) if len(set(pair)) > 1
  ]
  assert differ == [("matrix_share = 0.65", "matrix_share = 0.123457")]
  assert new.index("[h200]") < new.index("0.123457") < new.index("[b200]")


@pytest.mark.parametrize(
  ("name", "constants", "message"),
  [
    ("a100", {}, "name: expected a table of the file, got 'a100'"),
    ("h100", {"share": 1.0}, "h100: expected the field share, got none"),
  ],
)
def test_what_the_file_does_not_have_is_named(name, constants, message):
  with pytest.raises(ValueError, match=message):
    calibrate_plan.changed(hardware.FILE.read_text(), name, constants)


def test_bad_arguments_end_in_a_line(tmp_path, capsys):
  out = str(tmp_path / "mine.toml")
  assert calibrate_plan.main(["--name", "cpu", "--out", out, *SMALL, "--repeats", "0"]) == 2
  assert capsys.readouterr().err == "error: repeats: expected at least 1, got 0\n"
