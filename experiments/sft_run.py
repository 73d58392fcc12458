"""Supervised fine-tuning from gin files.

    python -m experiments.sft_run --gin FILE [--gin FILE ..] [--set a.b=c ..] --out DIR [--resume]

On a cluster every process is started with the same line (docs/clusters.md). Exit code 2: the
configuration is not fit, and nothing was started.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from experiments import gin_config, process
from intellect3 import compilation_cache


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m experiments.sft_run",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--gin", action="append", required=True, metavar="FILE")
  parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="bindings")
  parser.add_argument("--out", required=True, metavar="DIR", help="the run directory")
  parser.add_argument("--resume", action="store_true", help="go on from DIR's last checkpoint")
  arguments = parser.parse_args(argv)
  compilation_cache.set_default()

  def build() -> Callable[[], None]:
    text = gin_config.read(arguments.gin, arguments.bindings)
    gin_config.parse(text, without_jax=False)
    from intellect3 import sft  # after `parse`: it imports jax

    train = gin_config.call(sft.run, run_dir=arguments.out, resume=arguments.resume)
    return lambda: _train(train, pathlib.Path(arguments.out), text)

  return process.run_together(build)


def _train(train: Callable[[], dict[str, Any]], out: pathlib.Path, text: str) -> None:
  out.mkdir(parents=True, exist_ok=True)
  (out / "config.gin").write_text(text)
  result = train()
  print(
    f"{result['steps']} steps in {result['wall_seconds']:.0f} s: "
    f"loss {result['loss_start']:.3f} -> {result['loss_end']:.3f}, "
    f"{result['tokens_per_second'] or 0:.0f} tokens/s, model in {out / 'model'}",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
