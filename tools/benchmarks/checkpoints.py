"""Peak memory and speed of checkpoints: load, save and conversions, on a model made on the spot.

    python -m tools.benchmarks.checkpoints --gigabytes 4 --out checkpoints.json

The model (GLM-4.5 family, random bfloat16) is written streaming, so that making it needs no memory
either. Each action runs in a process of its own: its peak resident memory (`ru_maxrss`) is set
against that of a process that only imports the same modules.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from intellect3.models import presets
from intellect3.models.config import ModelConfig
from intellect3.models.hf import companions, layout, names, read
from intellect3.models.stored import shards

ACTIONS = ("nothing", "hf-to-orbax", "orbax-to-hf", "verify", "load-whole", "load-sharded", "save")


def config_of(gigabytes: float) -> ModelConfig:
  """A model of the GLM-4.5 family whose bfloat16 checkpoint has about that size."""
  config = presets.glm_4_5_air(
    embed_dim=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=2048,
    expert_mlp_dim=512,
    num_experts=32,
    vocab_size=8192,
    num_layers=3,
    param_dtype="bfloat16",
  )
  per_layer = 2 * 3 * 1024 * 512 * (32 + 1)
  layers = max(3, 1 + round(gigabytes * 1e9 / per_layer))
  return dataclasses.replace(config, num_layers=layers)


def make(directory: pathlib.Path, config: ModelConfig, shard_bytes: int) -> int:
  """Writes a random checkpoint tensor by tensor; returns its tensors' bytes."""
  total = 0

  def tensors():
    nonlocal total
    for number, slot in enumerate(names.slots(config)):
      shape = names.stored_shape(slot.entry, layout.slot_shape(config, slot.entry))
      kind = read.leaf_dtype(slot.entry, config.param_dtype)
      tensor = shards.Deferred(shape, kind, _random(number, shape, kind))
      total += tensor.nbytes
      yield slot.name, tensor

  directory.mkdir(parents=True)
  shards.write(directory, tensors(), shard_bytes=shard_bytes, threads=1)
  companions.write_config(directory, config, config.param_dtype, None, 0)
  return total


def _random(seed: int, shape: tuple[int, ...], kind: np.dtype):
  def draw() -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * 0.02
    return values.astype(kind)

  return draw


def act(action: str, room: pathlib.Path) -> None:
  """Does one action in this process."""
  import jax

  from intellect3.models import hf, transformer
  from tools import convert_checkpoint

  source, orbax, back = (str(room / name) for name in ("hf", "orbax", "back"))
  arguments = {
    "hf-to-orbax": ["hf-to-orbax", source, orbax],
    "orbax-to-hf": ["orbax-to-hf", orbax, back, "--shard-gb", "0.5"],
    "verify": ["verify", source, back],
  }
  if action in arguments:
    code = convert_checkpoint.main(arguments[action])
    if code:
      raise SystemExit(code)
  elif action == "load-whole":
    hf.load(source)
  elif action in ("load-sharded", "save"):
    config = hf.check(source)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda shape: place, transformer.abstract(config)[0])
    params = hf.load_sharded(source, config, shardings)
    if action == "save":
      hf.save(room / "saved", config, params, source=source)


def measure(action: str, room: pathlib.Path) -> dict[str, float]:
  """Seconds and peak resident gigabytes of an action in a process of its own."""
  command = [sys.executable, "-m", "tools.benchmarks.checkpoints", "--act", action, str(room)]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def run(gigabytes: float, directory: str | None = None) -> dict[str, Any]:
  """Makes the model, runs every action and returns the figures."""
  with tempfile.TemporaryDirectory(dir=directory) as temporary:
    room = pathlib.Path(temporary)
    config = config_of(gigabytes)
    size = make(room / "hf", config, shard_bytes=500_000_000)
    figures = {action: measure(action, room) for action in ACTIONS}
  base = figures.pop("nothing")["peak_gb"]
  for figure in figures.values():
    figure["peak_over_base_gb"] = round(figure["peak_gb"] - base, 3)
    figure["gb_per_second"] = round(size / 1e9 / figure["seconds"], 3)
  return {
    "model_gb": round(size / 1e9, 3),
    "layers": config.num_layers,
    "largest_tensor_gb": 2 * config.vocab_size * config.embed_dim / 1e9,
    "imports_gb": base,
    "actions": figures,
  }


def main() -> None:
  """Prints the figures as JSON, or does one action."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--gigabytes", type=float, default=4.0)
  parser.add_argument("--directory", help="where to make the model (default: the temporary one)")
  parser.add_argument("--out", help="JSON to write")
  parser.add_argument("--act", nargs=2, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.act is not None:
    began = time.perf_counter()
    act(flags.act[0], pathlib.Path(flags.act[1]))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": round(seconds, 2), "peak_gb": round(peak, 3)}))
    return
  figures = run(flags.gigabytes, flags.directory)
  text = json.dumps(figures, indent=2) + "\n"
  print(text, end="")
  if flags.out is not None:
    pathlib.Path(flags.out).write_text(text)


os.environ.setdefault("JAX_PLATFORMS", "cpu")

if __name__ == "__main__":
  main()
