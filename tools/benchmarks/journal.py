"""What the journal costs a worker: CPU seconds and bytes a rollout, against no journal.

    python -m tools.benchmarks.journal --json build/journal.json
    python -m tools.benchmarks.journal --tokens 4 --segments 1 --effects 0 --rollouts 2000

Production workers and conversations run two-turn rollouts against a pool that answers at once, so
that what is measured is the worker alone. `none` keeps no journal, the baseline; `later` has one
whose rollouts are over before anything but an effect is due on the disk; `segments` writes each
segment as it comes (`journal_seconds` 0: more than any run writes). The second line is the demo's
case. Sides take turns; medians.
"""

import argparse
import asyncio
import datetime
import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np

from intellect3 import types
from intellect3.environments import base
from intellect3.rendering import bytes as byte_format
from intellect3.rollouts import conversation, journal, messages, worker

SIDES: dict[str, float | None] = {"none": None, "later": 3600.0, "segments": 0.0}


class TwoTurns:
  """Two turns with effects between them."""

  name = "two_turns"

  def __init__(self, effects: int) -> None:
    self._effects = effects

  def size(self, split: str) -> int:
    """See Environment."""
    del split
    return 1 << 20

  def task(self, split: str, index: int) -> types.Task:
    """See Environment."""
    return types.Task(task_id=f"{split}/{index}", environment=self.name, prompt=[])

  async def run(self, task: types.Task, talk: base.Conversation) -> base.Score:
    """See Environment."""
    await talk.send([{"role": "user", "content": task.task_id}])
    for _ in range(self._effects):
      await talk.effect("tool", lambda: asyncio.sleep(0, "found"))
    await talk.send([{"role": "user", "content": "more"}])
    return base.Score(reward=1.0)


class Pool:
  """Answers at once: `segments` pieces of `tokens` tokens, with `experts` bytes a token."""

  def __init__(self, tokens: int, segments: int, experts: int) -> None:
    self._piece = types.Generation(
      tokens=np.full(tokens, 97, np.int32),
      inference_logprobs=np.full(tokens, -1.0, np.float32),
      policy_versions=np.zeros(tokens, np.int32),
      finish_reason="length",
      server="http://server",
      routed_experts=np.zeros((tokens, experts, 1), np.uint8) if experts else None,
    )
    self._segments = segments

  async def generate(self, prompt_ids: Any, *, progress: Any, **options: Any) -> types.Generation:
    """See ServerPool."""
    del prompt_ids, options
    for _ in range(self._segments):
      progress(self._piece)
      await asyncio.sleep(0)
    return types.joined([self._piece] * self._segments, "length", 0)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rollouts", type=int, default=256)
  parser.add_argument("--tokens", type=int, default=4096, help="of a segment")
  parser.add_argument("--segments", type=int, default=2, help="of a turn; a rollout has two")
  parser.add_argument("--effects", type=int, default=1, help="of a rollout")
  parser.add_argument("--experts", type=int, default=0, help="bytes of routed experts a token")
  parser.add_argument("--repetitions", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
  arguments = parser.parse_args(argv)
  figures: dict[str, list[tuple[float, int]]] = {name: [] for name in SIDES}
  for number in range(arguments.repetitions + 1):
    for name in SIDES:
      measured = asyncio.run(_measure(arguments, SIDES[name]))
      if number:  # the first round warms up
        figures[name].append(measured)
  said = _figures(figures)
  for name, row in said.items():
    print(
      f"{name:10} {row['cpu_milliseconds']:8.3f} ms a rollout ({row['ratio']:.2f} x none), "
      f"{row['bytes'] / 1e3:10.1f} kB written"
    )
  if arguments.json is not None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "machine": platform.processor() or platform.machine(),
      "python": platform.python_version(),
      "arguments": {key: value for key, value in vars(arguments).items() if key != "json"},
      "figures": said,
    }
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
  return 0


def _figures(measured: dict[str, list[tuple[float, int]]]) -> dict[str, dict[str, float]]:
  """Medians by side."""
  seconds = {name: statistics.median(one for one, _ in rows) for name, rows in measured.items()}
  return {
    name: {
      "cpu_milliseconds": 1e3 * seconds[name],
      "ratio": seconds[name] / seconds["none"],
      "bytes": statistics.median(count for _, count in rows),
    }
    for name, rows in measured.items()
  }


async def _measure(arguments: argparse.Namespace, seconds: float | None) -> tuple[float, int]:
  """CPU seconds and bytes written, a rollout."""
  ended: asyncio.Queue[messages.FromWorker] = asyncio.Queue()
  pool = Pool(arguments.tokens, arguments.segments, arguments.experts)
  written: list[int] = []
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)

    def talk_to(dispatch: messages.Dispatch, kept: journal.Journal) -> Any:
      return conversation.RecordedConversation(
        byte_format.ByteRenderer(),
        pool,  # type: ignore[arg-type]  # takes what it reads of a pool's arguments
        seed=dispatch.seed,
        rid=f"{dispatch.rollout_id}",
        temperature=1.0,
        max_new_tokens=arguments.tokens * arguments.segments,
        max_tokens=1 << 30,
        journal=kept,
      )

    async def release() -> None:
      pass

    def journals(failed: Any) -> journal.Store:
      assert seconds is not None
      return journal.Store(directory, seconds=seconds, failed=failed, act=act)

    async def act(function: Any, path: pathlib.Path, *data: bytes) -> Any:
      written.extend(map(len, data))
      return await asyncio.to_thread(function, path, *data)

    working = worker.Worker(
      "worker",
      environments={"two_turns": TwoTurns(arguments.effects)},
      make_conversation=talk_to,
      pool=None,  # type: ignore[arg-type]  # nothing steers it
      send=ended.put_nowait,
      log_dir=directory,
      release=release,
      make_journals=journals if seconds is not None else None,
    )
    count = arguments.rollouts
    started = time.process_time()
    for rollout_id in range(count):
      working.handle(_dispatch(rollout_id))
    for _ in range(count):
      await ended.get()
    before = -1
    while sum(written) != before:  # what is written beside has not ended with its rollout
      before = sum(written)
      await asyncio.sleep(0.05)
    working.handle(messages.Forget(rollout_ids=range(count)))
    while _journals(directory):  # noqa: ASYNC110 - until they are removed, in threads
      await asyncio.sleep(0.01)
    spent = time.process_time() - started
    await working.close()
  return spent / count, sum(written) // count


def _journals(directory: pathlib.Path) -> list[pathlib.Path]:
  return list(directory.glob("rollout_?????????"))


def _dispatch(rollout_id: int) -> messages.Dispatch:
  return messages.Dispatch(
    rollout_id=rollout_id,
    group_id=rollout_id,
    sample=0,
    environment="two_turns",
    split="train",
    index=rollout_id,
    seed=rollout_id,
    temperature=1.0,
  )


if __name__ == "__main__":
  sys.exit(main())
