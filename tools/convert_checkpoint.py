"""Converts checkpoints between Hugging Face's format and Orbax's, and compares them.

    python -m tools.convert_checkpoint hf-to-orbax HF_DIR DST
    python -m tools.convert_checkpoint orbax-to-hf RUN_OR_ORBAX_DIR DST --dtype bfloat16
    python -m tools.convert_checkpoint verify ONE OTHER

One tensor at a time: memory does not grow with the model. See docs/checkpoints.md. Exit codes: 0,
done or the same; 1, `verify` found differences; 2, an error: it is told, and nothing is written.
"""

import argparse
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from intellect3.models.hf import companions
from tools.checkpoints import compare, convert, opened
from tools.checkpoints.progress import Progress

GIGABYTE = 1_000_000_000


def main(arguments: list[str] | None = None) -> int:
  """Runs a command; returns the exit code."""
  flags = parse(arguments)
  try:
    return COMMANDS[flags.command](flags)
  except (ValueError, OSError) as error:
    print(f"convert_checkpoint: {error}", file=sys.stderr)
    return 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.convert_checkpoint",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, help_text in (
    ("hf-to-orbax", "Hugging Face's format to Orbax's"),
    ("orbax-to-hf", "a run's checkpoint, or an Orbax one of ours, to Hugging Face's format"),
    ("verify", "compare two directories, of either kind"),
  ):
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("src")
    command.add_argument("dst")
    if name != "verify":
      command.add_argument("--dtype", choices=convert.DTYPES, help="convert the tensors to it")
    whether = "whether to compare the " if name == "verify" else ""
    command.add_argument(
      "--extras",
      choices=companions.EXTRAS,
      default="keep",
      help=f"{whether}tensors of multi-token prediction layers (default: %(default)s)",
    )
    if name != "hf-to-orbax":
      command.add_argument("--step", type=int, help="of a run (default: the newest)")
      command.add_argument("--model", help="where config.json and tokenizer of an Orbax SRC are")
    if name == "orbax-to-hf":
      command.add_argument(
        "--shard-gb", type=float, default=5.0, help="largest file (default: %(default)s)"
      )
  return parser.parse_args(arguments)


def hf_to_orbax(flags: argparse.Namespace) -> int:
  """The command of that name."""
  convert.check_target(flags.dst, flags.src)
  source = opened.hugging_face(flags.src)
  _say_extras(source, flags.extras)
  with Progress("hf-to-orbax", _written_bytes(source, flags)) as progress:
    convert.to_orbax(source, flags.dst, dtype=flags.dtype, extras=flags.extras, progress=progress)
  return 0


def orbax_to_hf(flags: argparse.Namespace) -> int:
  """The command of that name."""
  if not flags.shard_gb > 0:
    raise ValueError(f"--shard-gb: expected more than 0, got {flags.shard_gb}")
  convert.check_target(flags.dst, flags.src)
  source = opened.of_orbax(flags.src, step=flags.step, model=flags.model)
  _say_extras(source, flags.extras)
  with Progress("orbax-to-hf", _written_bytes(source, flags)) as progress:
    convert.to_hugging_face(
      source,
      flags.dst,
      dtype=flags.dtype,
      shard_bytes=max(1, int(flags.shard_gb * GIGABYTE)),
      extras=flags.extras,
      progress=progress,
    )
  return 0


def verify(flags: argparse.Namespace) -> int:
  """The command of that name."""
  one = opened.either(flags.src, step=flags.step, model=flags.model)
  other = opened.either(flags.dst)
  if flags.extras == "drop":
    one, other = (side._replace(extras={}) for side in (one, other))
  total = opened.total_bytes({**one.tensors, **one.extras})
  with Progress("verify", total) as progress:
    found = compare.compare(one, other, progress)
  for pattern, kind in found.kinds.items():
    notes = f"  ({' against '.join(kind.dtypes)})" if kind.dtypes else ""
    if kind.differing:
      print(
        f"{pattern}: {len(kind.differing)} of {kind.tensors} differ, by {kind.largest:.3g} at "
        f"most{notes}"
      )
      for name in kind.differing:
        print(f"  differs: {name}")
    elif notes:
      print(f"{pattern}: {kind.tensors} with the same values{notes}")
  for fault in found.faults:
    print(fault)
  count = sum(kind.tensors for kind in found.kinds.values())
  left = " without those of layers past the last" if flags.extras == "drop" else ""
  print(f"{count} tensors compared{left}: {'the same' if found.same else 'NOT the same'}")
  return 0 if found.same else 1


def _written_bytes(source: opened.Opened, flags: argparse.Namespace) -> int:
  return convert.written_bytes(source, dtype=flags.dtype, extras=flags.extras)


def _say_extras(source: opened.Opened, extras: str) -> None:
  if source.extras:
    print(
      f"{len(source.extras)} extra tensors ({opened.total_bytes(source.extras) / 1e9:.3f} GB) of "
      f"layers past the last: {'kept' if extras == 'keep' else 'dropped'}",
      file=sys.stderr,
    )


COMMANDS = {"hf-to-orbax": hf_to_orbax, "orbax-to-hf": orbax_to_hf, "verify": verify}

if __name__ == "__main__":
  sys.exit(main())
