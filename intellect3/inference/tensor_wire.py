"""Tensors as `/update_weights_from_tensor` carries them: written and read without torch.

Place in the ring: the `tensor` transport of weight sync writes this, the embedded engine reads it,
and so does a real SGLang server, whose restricted unpickler accepts what plain `pickle` makes of a
list of (name, CPU tensor) pairs. That is the format; one payload, base64 in the JSON body, is

    [(name, _rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())), ..]
    storage = _load_from_bytes(the bytes torch.save wrote for a typed storage in its older format)

Tensors of one dtype share one storage. torch's CUDA and shared-memory handles, which mean something
in one machine only, are not part of it.

The reader interprets the pickle itself. It knows the operations and the four functions above and
nothing else, so a payload can make arrays or raise ValueError, and never call anything.
"""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from intellect3.inference import pickle_subset
from intellect3.inference.pickle_subset import Call, Chunks, Global

STORAGES: Mapping[str, np.dtype] = {
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "HalfStorage": np.dtype(np.float16),
  "FloatStorage": np.dtype(np.float32),
  "DoubleStorage": np.dtype(np.float64),
  "ByteStorage": np.dtype(np.uint8),
  "CharStorage": np.dtype(np.int8),
  "ShortStorage": np.dtype(np.int16),
  "IntStorage": np.dtype(np.int32),
  "LongStorage": np.dtype(np.int64),
}
"""The storage classes of torch that are spoken, and their elements."""

_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_LOAD = Global("torch.storage", "_load_from_bytes")
_HOOKS = Global("collections", "OrderedDict")
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def write(tensors: Sequence[tuple[str, np.ndarray]]) -> str:
  """One payload of some named tensors.

  Args:
    tensors: names and arrays of any shape, of the dtypes of `STORAGES`; little-endian.

  Returns:
    Base64 text; about 4/3 of the tensors' bytes.

  Raises:
    ValueError: a dtype that has no storage class, or a name given twice.
  """
  names = [name for name, _ in tensors]
  if len(set(names)) < len(names):
    raise ValueError(f"tensors: expected each name once, got {names}")
  starts: dict[np.dtype, int] = {}
  chunks: dict[np.dtype, list[np.ndarray]] = {}
  placed: list[tuple[str, np.ndarray, int]] = []
  for name, array in tensors:
    if array.dtype not in _NAMES:
      known = ", ".join(str(dtype) for dtype in _NAMES)
      raise ValueError(f"tensors[{name!r}]: expected one of {known}, got {array.dtype}")
    placed.append((name, array, starts.get(array.dtype, 0)))
    starts[array.dtype] = starts.get(array.dtype, 0) + array.size
    chunks.setdefault(array.dtype, []).append(array)
  storages = {
    dtype: Call(_LOAD, (_write_storage(dtype, arrays),)) for dtype, arrays in chunks.items()
  }
  payload = [
    (
      name,
      Call(
        _REBUILD,
        (storages[array.dtype], start, array.shape, _strides(array.shape), False, Call(_HOOKS, ())),
      ),
    )
    for name, array, start in placed
  ]
  return base64.b64encode(pickle_subset.dump(payload)).decode("ascii")


def read(payload: str | bytes) -> dict[str, np.ndarray]:
  """The named tensors of a payload.

  Args:
    payload: base64 text, or the bytes it stands for.

  Returns:
    Arrays by name, bfloat16 as `ml_dtypes.bfloat16`; read-only views into the decoded payload.

  Raises:
    ValueError: anything but the format; the message says what was found.
  """
  if isinstance(payload, str):
    try:
      payload = base64.b64decode(payload, validate=True)
    except ValueError as error:
      raise ValueError(f"payload: expected base64, got {payload[:20]!r}..: {error}") from error
  value, end = pickle_subset.load(payload)
  if end != len(payload):
    raise ValueError(f"payload: expected its end at byte {end}, got {len(payload)} bytes")
  if not isinstance(value, list):
    raise ValueError(f"payload: expected a list of names and tensors, got {_show(value)}")
  storages: dict[int, np.ndarray] = {}
  tensors: dict[str, np.ndarray] = {}
  for item in value:
    match item:
      case (str(name), Call(function, arguments)) if function == _REBUILD and name not in tensors:
        tensors[name] = _rebuild(name, arguments, storages)
      case _:
        raise ValueError(f"payload: expected a new name and its tensor, got {_show(item)}")
  return tensors


def _rebuild(name: str, arguments: tuple, storages: dict[int, np.ndarray]) -> np.ndarray:
  match arguments:
    case (Call(load, (bytes() | memoryview(),)) as storage, offset, shape, strides, bool(), hooks):
      tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
      fits = load == _LOAD and hooks == Call(_HOOKS, ()) and tuples and _naturals(offset, *shape)
    case _:
      fits = False
  if not fits:
    raise ValueError(f"{name}: expected a contiguous tensor, got {_show(arguments)}")
  size = math.prod(shape)
  # The stride of an axis of length 1, and those of an empty tensor, mean nothing.
  expected = _strides(shape)
  if len(strides) != len(shape) or (
    size
    and any(
      length > 1 and given != natural
      for length, given, natural in zip(shape, strides, expected, strict=True)
    )
  ):
    raise ValueError(f"{name}: strides: expected {expected} for {shape}, got {strides}")
  if id(storage) not in storages:
    storages[id(storage)] = _read_storage(name, memoryview(storage.arguments[0]))
  elements = storages[id(storage)]
  if offset + size > elements.size:
    raise ValueError(
      f"{name}: expected {size} elements from {offset}, got a storage of {elements.size}"
    )
  return elements[offset : offset + size].reshape(shape)


def _write_storage(dtype: np.dtype, arrays: Sequence[np.ndarray]) -> Chunks:
  """What `torch.save` writes for a typed storage in its older format: five pickles, then bytes."""
  size = sum(array.size for array in arrays)
  types = {"short": 2, "int": 4, "long": 4}
  persistent = pickle_subset.Persistent(
    ("storage", Global("torch", _NAMES[dtype]), "0", "cpu", size, None)
  )
  info = {"protocol_version": _PROTOCOL, "little_endian": True, "type_sizes": types}
  parts: list[bytes | memoryview] = [
    # The protocol that torch.load expects here.
    pickle_subset.dump(part, protocol=2)
    for part in (_MAGIC, _PROTOCOL, info, persistent, ["0"])
  ]
  parts.append(struct.pack("<q", size))
  parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays]
  return Chunks(parts)


def _read_storage(name: str, data: memoryview) -> np.ndarray:
  parts = []
  position = 0
  for _ in range(5):
    part, position = pickle_subset.load(data, position)
    parts.append(part)
  magic, protocol, info, persistent, keys = parts
  little = isinstance(info, dict) and info.get("little_endian") is True
  match persistent:
    case pickle_subset.Persistent(
      ("storage", Global("torch", kind), str(key), "cpu", int(size), None)
    ) if kind in STORAGES and keys == [key] and _naturals(size):
      dtype = STORAGES[kind]
    case _:
      raise ValueError(f"{name}: expected a storage on the CPU, got {_show(persistent)}")
  if (magic, protocol) != (_MAGIC, _PROTOCOL) or not little:
    raise ValueError(f"{name}: expected a little-endian storage of torch.save, got {_show(info)}")
  if len(data) - position != 8 + size * dtype.itemsize:
    raise ValueError(
      f"{name}: expected {size} elements of {dtype}, got {len(data) - position - 8} bytes"
    )
  if struct.unpack_from("<q", data, position)[0] != size:
    raise ValueError(f"{name}: expected {size} elements, got another count before them")
  return np.frombuffer(data, dtype, count=size, offset=position + 8)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
  """Of a contiguous tensor, in elements, as torch counts: an axis of length 0 counts as 1."""
  strides = []
  step = 1
  for length in reversed(shape):
    strides.append(step)
    step *= max(1, length)
  return tuple(reversed(strides))


def _naturals(*values: Any) -> bool:
  return all(type(value) is int and value >= 0 for value in values)


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}.."
