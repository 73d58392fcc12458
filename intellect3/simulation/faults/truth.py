"""The policy of a simulated world: which token follows, and what weights really say of it.

A logprob is a function of the weights' number, the token, the one before and its place. So whoever
reads a batch can tell of each token whether the weights stamped on it made it, and whether a token
was lost, doubled or moved on its way; of experts, which token and place they are of.
"""

import hashlib
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import msgspec
import numpy as np

from intellect3 import types
from intellect3.rendering import bytes as byte_format
from intellect3.weights import manifest as manifests

CANARY = (258, 104, 101, 108, 108, 111, 259, 7)
LONG = ord("l")
"""Where the first message begins with it, turns are as long as they may be."""
MIXED = 10_000
"""Number of weights that no trainer made: a load that broke off, or a wrong file."""
TENSORS = ("embedding", "layer", "head")
"""Each holds the number of its version."""
ROUTER = types.RouterShape(num_layers=3, num_dense_layers=1, num_experts=8, num_experts_per_token=2)
"""Of the simulated model, where a run asks for its experts."""


def logprobs(version: np.ndarray | int, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
  """float32[T]: of T tokens from a sequence's start, under weights `version` ([T] or one).

  Two versions differ by 0.001 at least at every token.
  """
  ids = np.asarray(tokens, np.int64)
  before = np.concatenate([np.zeros(1, np.int64), ids[:-1]])
  places = np.arange(len(ids))
  mixed = (np.asarray(version, np.int64) * 613 + before * 57 + ids * 131 + places * 31) % 997
  return (-(1.0 + mixed) / 1000.0).astype(np.float32)


def logprob(version: int, before: int, token: int, place: int) -> float:
  """One of them."""
  return -(1.0 + (version * 613 + before * 57 + token * 131 + place * 31) % 997) / 1000.0


def continuation(seed: int, prompt: Sequence[int], most: int) -> tuple[list[int], bool]:
  """The tokens that follow others, at most so many, and whether the turn ends there."""
  start, long = len(prompt), prompt[1] == LONG
  tokens: list[int] = []
  state = zlib.crc32(f"{seed}/{start}".encode())
  while len(tokens) < most:
    state = (state * 1103515245 + 12345) & 0x7FFFFFFF
    if state >> 16 & 15 == 0 and not long:
      tokens.append(byte_format.ENDOFTEXT)
      return tokens, True
    tokens.append(97 + (state >> 20) % 26)
  return tokens, False


def experts(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
  """uint8[T, MoE layers, A]: the experts of T tokens from a sequence's start; see `ROUTER`."""
  ids = np.asarray(tokens, np.int64)
  first_TL = (ids * 31 + np.arange(len(ids)) * 7)[:, None] + np.arange(ROUTER.num_moe_layers)
  second_TL = first_TL + 1 + (ids % (ROUTER.num_experts - 1))[:, None]
  return (np.stack([first_TL, second_TL], axis=-1) % ROUTER.num_experts).astype(np.uint8)


def publish(weights_dir: pathlib.Path, version: int, keep: int) -> None:
  """Publishes weights as the trainer does: a directory that appears by one rename."""
  target = manifests.version_directory(weights_dir, version)
  aside = weights_dir / f".aside_{version}"
  aside.mkdir(parents=True, exist_ok=True)
  data = struct.pack("<f", float(version))
  entries = {
    name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * place, 4 * place + 4]}
    for place, name in enumerate(TENSORS)
  }
  header = json.dumps(entries).encode()
  content = struct.pack("<Q", len(header)) + header + data * len(TENSORS)
  (aside / "model.safetensors").write_bytes(content)
  manifest = manifests.WeightsManifest(
    version=version,
    files=[manifests.WeightsFile(file="model.safetensors", bytes=len(content))],
    fingerprints=dict.fromkeys(TENSORS, zlib.crc32(data)),
    dtype="F32",
    canary_ids=list(CANARY),
    canary_logprobs=[0.0, *(float(x) for x in logprobs(version, CANARY)[1:])],
  )
  (aside / manifests.MANIFEST).write_bytes(msgspec.json.encode(manifest))
  os.rename(aside, target)
  for old in manifests.versions(weights_dir)[:-keep]:
    gone = weights_dir / f".gone_{old}"
    os.rename(manifests.version_directory(weights_dir, old), gone)
    for file in sorted(gone.iterdir()):
      file.unlink()
    gone.rmdir()


def load(directory: pathlib.Path) -> dict[str, int]:
  """The number of the weights in a directory, by tensor; raises OSError or ValueError where there
  are none."""
  content = (directory / "model.safetensors").read_bytes()
  values = struct.unpack(f"<{len(TENSORS)}f", content[-4 * len(TENSORS) :])
  if len(content) < 8 or len(content) != 8 + len(values) * 4 + struct.unpack("<Q", content[:8])[0]:
    raise ValueError(f"{directory.name}: the file ends inside a tensor")
  return {name: int(value) for name, value in zip(TENSORS, values, strict=True)}


def draw(seed: int, *parts: int | str) -> int:
  """A number below 2^63 from a seed and what it is for."""
  text = "/".join(map(str, (seed, *parts)))
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
