"""What a device computes, holds and is joined by: the constants of a prediction.

Place in the ring: beside it. The numbers stand in `hardware.toml`, with where they come from.
"""

import dataclasses
import pathlib
import tomllib
from collections.abc import Mapping

FILE = pathlib.Path(__file__).with_name("hardware.toml")
GIB = 2**30
MARGIN = 0.08
"""Share of the card that a plan leaves free: the CUDA context, NCCL's buffers, fragmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
  """One kind of device; fields as `hardware.toml` explains them.

  Attributes:
    memory: bytes.
    node: devices that the inner link joins.
    matrix_rate: FLOP/s by dtype (bf16, f16, f32).
    memory_rate: bytes/s.
    inner, outer: bytes/s of the links within and between nodes, per device and direction.
    host: bytes/s between the device and its host's memory, per direction.
    host_memory: bytes of the host's memory for each device.
    latency: seconds to start a collective.
    launch: seconds to start a kernel.
    matrix_share, kernel_share, memory_share, link_share: reached share of the rates, 0 to 1.
  """

  memory: int
  node: int
  matrix_rate: Mapping[str, float]
  memory_rate: float
  inner: float
  outer: float
  host: float
  host_memory: float
  latency: float
  launch: float
  matrix_share: float
  kernel_share: float
  memory_share: float
  link_share: float

  def __post_init__(self) -> None:
    """Raises ValueError naming the field, what was expected and what was given."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name == "matrix_rate":
        if "f32" not in value or min(value.values()) <= 0:
          raise ValueError(f"matrix_rate: expected rates > 0 with one for f32, got {value!r}")
      elif not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{field.name}: expected a number > 0, got {value!r}")
      elif field.name.endswith("_share") and value > 1:
        raise ValueError(f"{field.name}: expected a share from 0 to 1, got {value!r}")

  def matrix_seconds(self, flops: float, dtype: str) -> float:
    """Time of matrix products of factors of a dtype; others than the table's count as f32."""
    rate = self.matrix_rate.get(dtype, self.matrix_rate["f32"])
    return flops / (rate * self.matrix_share)

  def host_seconds(self, count: float) -> float:
    """Time to move so many bytes between the device and its host, one way."""
    return count / (self.host * self.link_share)

  def memory_seconds(self, count: float) -> float:
    """Time to read or write so many bytes of the device's memory."""
    return count / (self.memory_rate * self.memory_share)


def load(name: str, file: pathlib.Path | None = None) -> Hardware:
  """Reads one kind of device.

  Args:
    name: a table of the file.
    file: another file of `hardware.toml`'s form; None: that one.

  Raises:
    ValueError: no such file or table, or a field that is missing, unknown or wrong.
  """
  try:
    text = (file or FILE).read_text(encoding="utf-8")
  except OSError as error:
    raise ValueError(f"hardware: expected a file, got {file or FILE}: {error.strerror}") from error
  try:
    tables = tomllib.loads(text)
  except tomllib.TOMLDecodeError as error:
    raise ValueError(f"hardware: expected TOML, got {(file or FILE).name}: {error}") from error
  if name not in tables:
    raise ValueError(f"target: expected one of {tuple(tables)}, got {name!r}")
  try:
    return Hardware(**tables[name])
  except TypeError as error:
    raise ValueError(f"{file or FILE.name}, {name}: {error}") from error
