"""A scenario's `[servers]` from a roofline, where nothing has been measured.

    python -m tools.decode_rates --model glm_4_5_air --target h200 --devices 8
        [--hardware FILE] [--memory-share 0.85]

Prints TOML for `python -m tools.simulate_run --scenario`; what it counts and leaves out is said in
`intellect3/simulation/roofline.py`. A measurement is better.
"""

import argparse
import inspect
import pathlib
import sys

from intellect3.models import presets
from intellect3.models.config import ModelConfig
from intellect3.planning import hardware
from intellect3.simulation import roofline

RUNNING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.decode_rates", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--model", required=True, help="a preset of intellect3/models/presets.py")
  parser.add_argument("--target", default="h200", help="a table of hardware.toml")
  parser.add_argument("--hardware", type=pathlib.Path, help="another file of that form")
  parser.add_argument("--devices", type=int, required=True, help="of one server")
  parser.add_argument("--memory-share", type=float, default=0.85)
  arguments = parser.parse_args(argv)
  try:
    print(
      table(
        _model(arguments.model),
        hardware.load(arguments.target, arguments.hardware),
        devices=arguments.devices,
        memory_share=arguments.memory_share,
      )
    )
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def table(
  model: ModelConfig, target: hardware.Hardware, *, devices: int, memory_share: float
) -> str:
  """The lines of `[servers]` that a roofline gives.

  Raises:
    ValueError: the model does not fit on so many devices.
  """
  of = roofline.sizes(model)
  rates = roofline.decode_tokens_per_second(of, target, devices=devices, running=RUNNING)
  cached = roofline.seconds_per_cached_token(of, target, devices=devices)
  room = roofline.cache_tokens(of, target, devices=devices, memory_share=memory_share)
  prefill = roofline.prefill_tokens_per_second(of, target, devices=devices)
  return "\n".join(
    [
      f"devices = {devices}",
      f"decode_batch = {list(RUNNING)}",
      f"decode_tokens_per_second = {[round(rate, 1) for rate in rates]}",
      f"seconds_per_cached_token = {cached:.3e}",
      f"cache_tokens = {room}",
      f"prefill_tokens_per_second = {prefill:.0f}",
    ]
  )


def _model(name: str) -> ModelConfig:
  known = {key for key, _ in inspect.getmembers(presets, inspect.isfunction) if key[0] != "_"}
  if name not in known:
    raise ValueError(f"--model: expected one of {sorted(known)}, got {name!r}")
  return getattr(presets, name)()


if __name__ == "__main__":
  sys.exit(main())
