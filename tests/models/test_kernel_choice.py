"""Kernels by name: what `auto` becomes, that it is said, and what cannot run."""

import logging

import jax
import pytest

from intellect3.models import kernel_choice, presets


def test_auto_becomes_concrete_and_is_said(caplog):
  caplog.set_level(logging.INFO)
  config = kernel_choice.resolve(presets.tiny(grouped_matmul="dense"))
  assert (config.attention, config.grouped_matmul) == ("blockwise", "dense")
  said = [record.getMessage() for record in caplog.records]
  assert said == ["attention on cpu: blockwise (auto)", "grouped_matmul on cpu: dense"]


@pytest.mark.parametrize(
  ("changes", "platform", "message"),
  [
    ({"attention": "tokamax"}, "cpu", r"attention: expected plain, .* on cpu, got 'tokamax'"),
    ({"attention": "flash"}, "gpu", r"attention: expected one of .*, got 'flash'"),
    ({"grouped_matmul": "ragged_dot"}, "tpu", r"grouped_matmul: expected one of .*'ragged_dot'"),
    ({"grouped_matmul": "tokamax"}, "tpu", r"grouped_matmul: expected .* on tpu, got 'tokamax'"),
    ({"expert_exchange": "ragged"}, "cpu", r"exchange: expected padded .* on cpu, got 'ragged'"),
    ({}, "quantum", r"platform: expected one of .*, got 'quantum'"),
  ],
)
def test_what_cannot_run_is_named(changes, platform, message):
  with pytest.raises(ValueError, match=message):
    kernel_choice.resolve(presets.tiny(**changes), platform)


def test_what_the_compiler_splits_over_gpus_is_what_it_can_split():
  config = kernel_choice.resolve(presets.tiny(dtype="bfloat16"), "gpu", compiler_splits=True)
  assert (config.attention, config.grouped_matmul) == ("blockwise", "blocked")


@pytest.mark.parametrize(("platform", "exchange"), [("gpu", "ragged"), ("cpu", "padded")])
def test_an_exchange_between_devices_is_said(caplog, platform, exchange):
  caplog.set_level(logging.INFO)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("expert",))):
    config = kernel_choice.resolve(presets.tiny(), platform)
  assert config.expert_exchange == exchange
  assert f"expert_exchange on 2 x {platform}: {exchange} (auto)" in caplog.text
