"""FLOPs counted by hand, and against XLA's own count of a dense forward pass."""

import jax
import pytest

from intellect3.models import presets
from intellect3.training import flops


def test_active_parameters_of_the_tiny_model_by_hand():
  # q and o 64*64, k and v 64*32, two layers; dense 3*64*128; router 64*8 and (2+1) experts; head.
  attention = 2 * 64 * 64 + 2 * 64 * 32
  expected = 2 * attention + 3 * 64 * 128 + 64 * 8 + 3 * (3 * 64 * 32) + 64 * 264
  assert flops.active_matmul_params(presets.tiny()) == expected


def test_glm_4_5_air_has_12_billion_active_parameters():
  # Without the embedding (0.6B), which no token is multiplied with.
  assert 11.0e9 < flops.active_matmul_params(presets.glm_4_5_air()) < 13.0e9


def test_attention_counts_the_pairs_it_sees():
  config = presets.tiny()
  base = flops.train_flops(config, tokens=10, attended_pairs=0)
  assert base == 60 * flops.active_matmul_params(config)
  more = flops.train_flops(config, tokens=10, attended_pairs=55)
  assert more - base == 12 * 2 * 4 * 16 * 55


def test_peaks_by_device_kind():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  assert flops.peak_flops(Device("NVIDIA H100 80GB HBM3")) == 989e12
  assert flops.peak_flops(Device("NVIDIA H100 PCIe")) == 756e12
  assert flops.peak_flops(Device("NVIDIA H200")) == 989e12
  assert flops.peak_flops(Device("TPU v5 lite")) == 197e12
  assert flops.peak_flops(Device("TPU v5p")) == 459e12


def test_a_cpu_is_measured():
  found = flops.measured_flops(jax.devices("cpu")[0], size=128, seconds=0.01)
  assert 1e8 < found < 1e14


def test_mfu():
  assert flops.mfu(1e12, 2.0, 1e12, 2) == 0.25
  with pytest.raises(ValueError, match="seconds"):
    flops.mfu(1.0, 0.0, 1.0)
