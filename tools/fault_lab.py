"""Runs the whole stack of small runs under seeded faults; prints the seeds that break something.

    python -m tools.fault_lab [--schedules 300] [--seed 0] [--jobs 1]      seeds 0 to 299
    python -m tools.fault_lab --seed 17 --trace                            one of them, line by line

Server lost, slow, hung, back with old weights, answering garbage; worker lost; trainer stalled,
killed, resumed; orchestrator killed and resumed; messages late, lost, twice, out of order; disk
full; files half written. The same seed gives the same trace, byte for byte (docs/design/0013).
A table at the end says in how many schedules each of it was planned, struck, and was felt.
Nothing is started and jax is not imported. Exit code 1: a schedule breaks a contract, or hangs.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Iterator

from intellect3.simulation.faults import coverage, lab, schedule


def main(argv: list[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  if arguments.schedules < 1 or arguments.seed < 0 or arguments.jobs < 1:
    print("error: --schedules, --jobs: expected at least 1; --seed: at least 0", file=sys.stderr)
    return 2
  if arguments.trace:
    return _replay(arguments.seed)
  return _search(range(arguments.seed, arguments.seed + arguments.schedules), arguments.jobs)


def _search(seeds: range, jobs: int) -> int:
  started = time.perf_counter()
  ends: collections.Counter[str] = collections.Counter()
  covered = coverage.Coverage()
  failing = 0
  virtual = 0.0
  for number, outcome in enumerate(_outcomes(seeds, jobs), start=1):
    ends[outcome.end.partition(":")[0]] += 1
    covered.add(schedule.draw(outcome.seed), outcome)
    virtual += outcome.seconds if outcome.ok else 0.0
    if not outcome.ok:
      failing += 1
      print(f"seed {outcome.seed}: {outcome.end}")
      print(f"  replay: python -m tools.fault_lab --seed {outcome.seed} --trace", flush=True)
    if number % 25 == 0 or number == len(seeds):
      seconds = time.perf_counter() - started
      progress = f"{number} of {len(seeds)} schedules, {failing} failing, {seconds:.0f} s"
      print(progress, end="\r" if number < len(seeds) else "\n", file=sys.stderr, flush=True)
  counts = ", ".join(f"{name} {ends[name]}" for name in sorted(ends))
  print(f"{len(seeds)} schedules, {virtual / 3600:.1f} virtual hours: {counts}")
  print("\n".join(covered.table()))
  return 1 if failing else 0


def _outcomes(seeds: range, jobs: int) -> Iterator[lab.Outcome]:
  """In the order of the seeds, from so many processes."""
  if jobs == 1:
    yield from map(lab.run, seeds)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
    yield from pool.map(_without_trace, seeds, chunksize=25)


def _without_trace(seed: int) -> lab.Outcome:
  return dataclasses.replace(lab.run(seed), trace=())


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
  parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
  parser.add_argument("--trace", action="store_true", help="run one seed and print what happens")
  return parser


if __name__ == "__main__":
  sys.exit(main())
