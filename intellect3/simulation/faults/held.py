"""The weights in a simulated server's memory: what it really has, and what it says it has.

A server that stages (our engine) serves a version whole or not at all. One that does not (SGLang)
changes tensor by tensor: what breaks a load off leaves a mixture, under whatever it was told last.
"""

import pathlib
from collections.abc import Sequence

from intellect3.inference import tensor_wire
from intellect3.simulation.faults import truth


class Held:
  """One process's weights.

  Attributes:
    label: the version that it stamps on tokens.
    next_load: what becomes of the next load: nothing special, `fails` or `wrong`.
    last_load: what became of the last one so.
    open: whether a session of `/begin_weight_update` is.
  """

  def __init__(self, stages: bool, label: str, version: int) -> None:
    """Args: stages: see the module. label, version: what it says and has at first."""
    self._stages = stages
    self.label = label
    self.next_load = self.last_load = ""
    self._tensors = dict.fromkeys(truth.TENSORS, version)
    self._staged: dict[str, int] | None = None
    self._staged_label = ""
    self._served = version

  @property
  def truth(self) -> int:
    """Number of the weights it computes with; `truth.MIXED` where they are of several versions."""
    return self._served

  @property
  def open(self) -> bool:
    return self._staged is not None

  def load(self, directory: pathlib.Path, label: str) -> None:
    """Loads a directory; raises OSError or ValueError where that fails."""
    how = self._how()
    tensors: dict[str, int] = {}
    try:
      tensors = truth.load(directory)
      if how == "fails":
        raise ValueError("a shard could not be read")
    except (OSError, ValueError):
      if not self._stages:  # the first ones are in place already
        self._take({truth.TENSORS[0]: tensors.get(truth.TENSORS[0], truth.MIXED)})
      raise
    self._take(tensors, how)
    self.label = label

  def begin(self) -> None:
    """Opens a session; raises ValueError where one is."""
    if self._staged is not None:
      raise ValueError("a weight-update session is already open")
    self._staged, self._staged_label = {}, ""

  def bucket(self, payloads: Sequence[str], label: str) -> None:
    """Takes tensors as `/update_weights_from_tensor` brings them; raises ValueError."""
    if self._staged is None:
      raise ValueError("no session is open")
    tensors = {name: int(array[0]) for name, array in tensor_wire.read(payloads[0]).items()}
    if self.next_load == "fails" and truth.TENSORS[-1] in tensors:
      self._how()
      if not self._stages:
        self._take({name: tensors[name] for name in list(tensors)[:1]})
      raise ValueError("a bucket could not be read")
    self._staged |= tensors
    self._staged_label = label
    if not self._stages:
      self._take(tensors)
      self.label = label

  def end(self, abort: bool) -> None:
    """Closes the session: serves what came in it, or drops it. Raises ValueError where none is."""
    if self._staged is None:
      raise ValueError("no session is open")
    tensors, self._staged = self._staged, None
    if abort:
      return
    self._take(tensors, self._how())
    self.label = self._staged_label or self.label

  def _how(self) -> str:
    self.last_load, self.next_load = self.next_load, ""
    return self.last_load

  def _take(self, tensors: dict[str, int], how: str = "") -> None:
    self._tensors |= tensors
    numbers = set(self._tensors.values())
    self._served = numbers.pop() if len(numbers) == 1 and how != "wrong" else truth.MIXED
