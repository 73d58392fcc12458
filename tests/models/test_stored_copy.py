"""Blocked copies are plain assignments."""

import ml_dtypes
import numpy as np
import pytest

from intellect3.models.stored import directory


@pytest.mark.parametrize(
  "dtypes",
  [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
  ],
)
@pytest.mark.parametrize("shape", [(0, 3), (7,), (5, 6), (700, 1024), (1024, 700), (33, 16, 600)])
def test_copies_of_any_order_of_axes(dtypes, shape, monkeypatch):
  monkeypatch.setattr(directory, "_BLOCK_BYTES", 50_000)
  given = np.random.default_rng(0).standard_normal(shape).astype(dtypes[0])
  views = [given, given.T, given[::2].T, given[..., 1:]]
  if given.ndim == 3:
    views += [given.transpose(2, 0, 1), given.transpose(1, 2, 0), given.transpose(1, 0, 2)]
  for source in views:
    out = np.zeros(source.shape, dtypes[1])
    directory.copy(out, source)
    expected = source.astype(dtypes[1])
    assert out.dtype == np.dtype(dtypes[1])
    np.testing.assert_array_equal(out, expected)
    # Into a part of something larger, which is left alone.
    frame = np.zeros((2, *source.shape), dtypes[1])
    directory.copy(frame[1], source)
    np.testing.assert_array_equal(frame[1], expected)
    assert not frame[0].any()


def test_bits_of_numbers_that_are_none_survive():
  bits = np.arange(0x7F80, 0x7F80 + 128, dtype=np.uint16)  # infinity, and every kind of NaN
  out = np.zeros(128, ml_dtypes.bfloat16)
  directory.copy(out, bits.view(ml_dtypes.bfloat16))
  np.testing.assert_array_equal(out.view(np.uint16), bits)
