"""Runs the whole stack of small runs under seeded faults; prints the seeds that break something.

    python -m tools.fault_lab [--schedules 300] [--seed 0]      seeds 0 to 299
    python -m tools.fault_lab --seed 17 --trace                 one of them, line by line

Server lost, slow, hung, back with old weights, answering garbage; worker lost; trainer stalled,
killed, resumed; orchestrator killed and resumed; messages late, lost, twice, out of order; disk
full; files half written. The same seed gives the same trace, byte for byte (docs/design/0013).
Nothing is started and jax is not imported. Exit code 1: a schedule breaks a contract, or hangs.
"""

import argparse
import collections
import sys
import time

from intellect3.simulation.faults import lab, schedule


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  if arguments.schedules < 1 or arguments.seed < 0:
    print("error: --schedules: expected at least 1; --seed: at least 0", file=sys.stderr)
    return 2
  if arguments.trace:
    return _replay(arguments.seed)
  return _search(arguments.seed, arguments.schedules)


def _search(first: int, count: int) -> int:
  started = time.perf_counter()
  ends: collections.Counter[str] = collections.Counter()
  struck: collections.Counter[str] = collections.Counter()
  failing = 0
  virtual = 0.0
  for number, seed in enumerate(range(first, first + count), start=1):
    outcome = lab.run(seed)
    ends[outcome.end.partition(":")[0]] += 1
    struck.update(outcome.happened)
    virtual += outcome.seconds if outcome.ok else 0.0
    if not outcome.ok:
      failing += 1
      print(f"seed {seed}: {outcome.end}")
      print(f"  replay: python -m tools.fault_lab --seed {seed} --trace", flush=True)
    if number % 25 == 0 or number == count:
      seconds = time.perf_counter() - started
      progress = f"{number} of {count} schedules, {failing} failing, {seconds:.0f} s"
      print(progress, end="\r" if number < count else "\n", file=sys.stderr, flush=True)
  print(f"{count} schedules, {virtual / 3600:.1f} virtual hours: {_counts(ends)}")
  print(f"schedules with each fault: {_counts(struck)}")
  return 1 if failing else 0


def _counts(counter: collections.Counter[str]) -> str:
  return ", ".join(f"{name} {counter[name]}" for name in sorted(counter))


def _replay(seed: int) -> int:
  plan = schedule.draw(seed)
  print(f"seed {seed}: {plan.world}")
  for fault in plan.faults:
    print(f"  planned: {fault}")
  outcome = lab.run_plan(plan)
  print("\n".join(outcome.trace))
  print(f"{'ok' if outcome.ok else 'NOT OK'}: {outcome.end}")
  return 0 if outcome.ok else 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--schedules", type=int, default=300, help="how many seeds")
  parser.add_argument("--seed", type=int, default=0, help="the first, or the only one")
  parser.add_argument("--trace", action="store_true", help="run one seed and print what happens")
  return parser


if __name__ == "__main__":
  sys.exit(main())
