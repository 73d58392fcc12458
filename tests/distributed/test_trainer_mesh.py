"""What does not divide over the trainer's mesh is refused before anything is started."""

import math
from typing import Any

import jax
import pytest

from intellect3.models import presets
from intellect3.rl import trainer
from intellect3.rl.checks import NotStarted
from intellect3.sharding import rules


@pytest.mark.parametrize(
  ("mesh", "processes", "message"),
  [
    ({"fsdp": 3}, 1, r"trainer.mesh: expected .* number of devices, 1, got {'fsdp': 3}"),
    ({"fsdp": 3}, 2, "trainer.mesh: expected as many devices for each of 2 processes, got"),
    ({"fsdp": 2.0}, 2, r"trainer.mesh\['fsdp'\]: expected an integer >= 1, got 2.0"),
    ({"fsdp": "8"}, 2, r"trainer.mesh\['fsdp'\]: expected an integer >= 1, got '8'"),
    ({"fsdpp": 2}, 2, r"trainer.mesh: expected sizes of the axes .*, got \['fsdpp'\]"),
    (8, 2, "trainer.mesh: expected sizes of the axes .*, got 8"),
  ],
)
def test_meshes_that_are_none(monkeypatch, mesh: Any, processes, message):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  with pytest.raises(NotStarted, match=message) as failure:
    trainer._checked_mesh(mesh, processes)
  assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
  ("mesh", "rows", "length", "message"),
  [
    ({"data": 2, "expert": 4}, 12, 64, r"trainer.micro_rows: expected a multiple .* = 8, got 12"),
    ({"context": 4}, 4, 60, r"trainer.row_length: expected a multiple of .* = 8, got 60"),
    ({"tensor": 4}, 4, 64, "trainer.mesh, rules: .*attention/k/bias: expected kv_heads to divide"),
    ({"expert": 3}, 3, 64, "trainer.mesh, rules: .*experts to divide by 3 .*more tensors"),
  ],
)
def test_what_does_not_divide(monkeypatch, mesh, rows, length, message):
  monkeypatch.setattr(jax, "device_count", lambda: math.prod(mesh.values()))
  grid = trainer._checked_mesh(mesh, 1)
  models = [presets.tiny()]
  with pytest.raises(NotStarted, match=message) as failure:
    trainer._check_fit(grid, models, rules.TRAIN_FSDP, micro_rows=rows, row_length=length)
  assert "\n" not in str(failure.value)


def test_what_divides(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 16)
  grid = trainer._checked_mesh({"fsdp": 2, "expert": 2, "context": 2, "tensor": 2}, 1)
  trainer._check_fit(grid, [presets.tiny()], rules.TRAIN_FSDP_EXPERT, micro_rows=4, row_length=64)
  assert trainer._checked_mesh({"fsdp": 6}, 3).shape["fsdp"] == 6  # devices of processes to come
