"""The wire format of tensors against torch itself, both ways, and what is not the format."""

import base64
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intellect3.inference import tensor_wire

torch = pytest.importorskip("torch")

# What SGLang 0.5.23's restricted unpickler lets a payload name; `_load_from_bytes` is replaced
# there by a torch.load with weights_only.
SGLANG_ALLOWS = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}


class AsSglang(pickle.Unpickler):
  """Reads as the server does."""

  def find_class(self, module, name):
    if (module, name) == ("torch.storage", "_load_from_bytes"):
      return lambda data: torch.load(io.BytesIO(data), weights_only=True)
    assert (module, name) in SGLANG_ALLOWS, (module, name)
    return super().find_class(module, name)


def read_by_torch(payload):
  return AsSglang(io.BytesIO(base64.b64decode(payload, validate=True))).load()


def some_tensors():
  rng = np.random.default_rng(0)
  normal = rng.standard_normal((4, 3, 2)).astype(np.float32)
  return [
    ("model.norm.weight", normal[0, 0]),
    ("a.bf16", normal.astype(ml_dtypes.bfloat16)),
    ("a.transposed", normal[0].T),
    ("a.scalar", np.float32(3.5).reshape(())),
    ("a.empty", np.zeros((0, 4), np.float32)),
    ("a.half", normal[1].astype(np.float16)),
    ("a.ids", np.arange(-2, 5)),
    ("b.bf16", normal[2].astype(ml_dtypes.bfloat16)),
  ]


def as_numpy(tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def test_torch_reads_what_we_write():
  tensors = some_tensors()
  loaded = read_by_torch(tensor_wire.write(tensors))
  assert [name for name, _ in loaded] == [name for name, _ in tensors]
  for (name, tensor), (_, array) in zip(loaded, tensors, strict=True):
    assert tensor.shape == array.shape and tensor.is_contiguous(), name
    assert as_numpy(tensor).dtype == array.dtype
    np.testing.assert_array_equal(as_numpy(tensor), array, err_msg=name)
  # One storage a dtype, not a copy for each tensor.
  pointers = {t.untyped_storage().data_ptr() for _, t in loaded if t.dtype == torch.bfloat16}
  assert len(pointers) == 1


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_we_read_what_torch_writes(protocol):
  named = [
    (n, torch.from_numpy(np.array(a, order="C"))) for n, a in some_tensors() if a.dtype.kind in "fi"
  ]
  named.append(("brain", torch.arange(6).to(torch.bfloat16).reshape(2, 3)))
  loaded = tensor_wire.read(base64.b64encode(pickle.dumps(named, protocol=protocol)).decode())
  assert list(loaded) == [name for name, _ in named]
  for name, tensor in named:
    assert loaded[name].dtype == as_numpy(tensor).dtype
    np.testing.assert_array_equal(loaded[name], as_numpy(tensor), err_msg=name)


def test_what_we_write_we_read():
  for payload in (text := tensor_wire.write(some_tensors()), base64.b64decode(text)):
    loaded = tensor_wire.read(payload)
    for name, array in some_tensors():
      assert loaded[name].dtype == array.dtype
      np.testing.assert_array_equal(loaded[name], array, err_msg=name)
  assert tensor_wire.read(tensor_wire.write([])) == {}


def test_many_tensors_need_more_than_a_byte_of_memo():
  tensors = [(f"t{i}", np.full((2,), i, np.float32)) for i in range(700)]
  assert read_by_torch(tensor_wire.write(tensors))[600][1].tolist() == [600.0, 600.0]
  payload = pickle.dumps([(name, torch.from_numpy(array)) for name, array in tensors])
  assert tensor_wire.read(payload)["t699"].tolist() == [699.0, 699.0]


class Evil:
  def __reduce__(self):
    return (print, ("run",))


def transposed():
  return [("t", torch.arange(6.0).reshape(2, 3).T)]


def overlong():
  base = torch.arange(6.0)
  return pickle.dumps([("t", base)]).replace(b"K\x06\x85", b"K\x07\x85")


@pytest.mark.parametrize(
  ("payload", "says"),
  [
    ("not base64!", "base64"),
    (b"", "end"),
    (b"\x80\x04.", "well formed"),
    (b"\x80\x04]", "end"),
    (pickle.dumps({"a": 1}), "list"),
    (pickle.dumps([("a", 1)]), "name and its tensor"),
    (pickle.dumps([("a", Evil())]), "name and its tensor"),
    (pickle.dumps(Evil()), "list"),
    (pickle.dumps([("a", np.zeros(3, np.float32))]), "pickle: operation"),
    (pickle.dumps([("a", torch.ones(1)), ("a", torch.ones(1))]), "new name"),
    (pickle.dumps([("a", torch.ones(1))]) + b"more", "its end"),
    (pickle.dumps(transposed()), "strides"),
    (pickle.dumps([("a", torch.ones(2, dtype=torch.complex64))]), "storage on the CPU"),
    (pickle.dumps([("a", torch.nn.Parameter(torch.ones(1)))]), "name and its tensor"),
    (overlong(), "7 elements"),
    (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".", "got its end"),
    (b"\x80\x04](" + b"r\xff\xff\xff\xff" + b"e.", "nothing to keep"),
  ],
)
def test_anything_else_is_refused_and_nothing_runs(payload, says, capsys):
  with pytest.raises(ValueError, match=says):
    tensor_wire.read(payload)
  assert capsys.readouterr().out == ""


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_payload_is_refused_or_reads_as_arrays(data):
  payload = bytearray(base64.b64decode(tensor_wire.write(some_tensors()[:3])))
  for _ in range(data.draw(st.integers(1, 3))):
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
  payload = payload[: data.draw(st.integers(0, len(payload)))]
  try:
    loaded = tensor_wire.read(bytes(payload))
  except ValueError:
    return
  assert all(isinstance(array, np.ndarray) for array in loaded.values())


@given(st.binary(max_size=60))
def test_noise_is_refused(noise):
  try:
    tensor_wire.read(noise)
  except ValueError:
    return
  assert tensor_wire.read(noise) == {}


def test_bad_tensors_are_named():
  with pytest.raises(ValueError, match="complex64"):
    tensor_wire.write([("c", np.zeros(2, np.complex64))])
  with pytest.raises(ValueError, match="each name once"):
    tensor_wire.write([("c", np.zeros(2)), ("c", np.zeros(2))])
