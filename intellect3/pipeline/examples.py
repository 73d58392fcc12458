"""Where supervised examples come from: demonstrations of environments, or a file of messages.

Each function makes an `sft_source.Example`: example number -> (tokens, loss_mask), a function of
the number alone.
"""

import json
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from intellect3.pipeline.sft_source import Example
from intellect3.rendering.base import Renderer
from intellect3.types import Task


class Demonstrated(Protocol):
  """An environment that can show how its tasks are done."""

  @property
  def name(self) -> str:
    """Name in the mix."""
    ...

  def size(self, split: str) -> int:
    """Number of tasks in a split."""
    ...

  def task(self, split: str, index: int) -> Task:
    """The task at an index."""
    ...

  def demonstration(self, task: Task, rng: random.Random) -> str:
    """An assistant's answer to the task, drawn with `rng`."""
    ...


def from_environments(
  environments: Sequence[Demonstrated], renderer: Renderer, *, seed: int = 0
) -> Example:
  """Demonstrations of single-turn environments, taken in turn, over shuffled train tasks.

  Args:
    environments: example n is of environment n modulo their number.
    renderer: the chat format.
    seed: of the choice of tasks and of the demonstrations.

  Returns:
    The examples; only the answer (with its stop token) is trained on.

  Raises:
    ValueError: no environments, or one that has no demonstrations.
  """
  if not environments:
    raise ValueError("environments: expected at least one, got none")
  for environment in environments:
    if not callable(getattr(environment, "demonstration", None)):
      raise ValueError(f"environments: {environment.name} has no demonstrations")

  def example(number: int) -> tuple[np.ndarray, np.ndarray]:
    environment = environments[number % len(environments)]
    rng = random.Random(f"{seed}/{number}")
    task = environment.task("train", rng.randrange(environment.size("train")))
    prompt = renderer.render(task.prompt)
    answer = renderer.completion(environment.demonstration(task, rng))
    return _masked([(prompt, False), (answer, True)])

  return example


def from_messages(path: str | os.PathLike[str], renderer: Renderer, *, seed: int = 0) -> Example:
  """Conversations from a file of JSON lines, shuffled anew in each pass over the file.

  Args:
    path: each line is `{"messages": [{"role": .., "content": ..}, ..]}`, ending with an assistant's
      message.
    renderer: the chat format. Every assistant's turn is trained on, as its prompt was seen.
    seed: of the order.

  Returns:
    The examples; number n is in pass n // lines.

  Raises:
    ValueError: an empty file, a line that is not such a conversation, or a chat format that
      rewrites earlier turns (such a conversation is no single branch of tokens).
  """
  lines = [line for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
  if not lines:
    raise ValueError(f"{path}: expected at least one conversation, got none")
  rendered = [
    _conversation(line, renderer, f"{path}: line {number}")
    for number, line in enumerate(lines, start=1)
  ]
  orders: dict[int, list[int]] = {}

  def example(number: int) -> tuple[np.ndarray, np.ndarray]:
    epoch, place = divmod(number, len(rendered))
    if epoch not in orders:
      order = list(range(len(rendered)))
      random.Random(f"{seed}/{epoch}").shuffle(order)
      orders.clear()  # examples are asked for in order: one pass at a time
      orders[epoch] = order
    return rendered[orders[epoch][place]]

  return example


def _conversation(line: str, renderer: Renderer, where: str) -> tuple[np.ndarray, np.ndarray]:
  try:
    messages = json.loads(line)["messages"]
    roles = [message["role"] for message in messages]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{where}: expected {{"messages": [..]}}, got {line[:80]!r}') from error
  if len(roles) < 2 or roles[-1] != "assistant" or roles[0] == "assistant":
    raise ValueError(f"{where}: expected a conversation that ends with the assistant, got {roles}")
  parts: list[tuple[Sequence[int], bool]] = []
  since: list[dict] = []
  for message in messages:
    if message["role"] != "assistant":
      since.append(message)
      continue
    if not since:
      raise ValueError(f"{where}: expected a message between two assistant's turns, got none")
    prompt = renderer.extend(since) if parts else renderer.render(since)
    if prompt is None:
      raise ValueError(f"{where}: the chat format rewrites earlier turns: one turn a line")
    parts += [(prompt, False), (renderer.completion(message["content"]), True)]
    since = []
  return _masked(parts)


def _masked(parts: Sequence[tuple[Sequence[int], bool]]) -> tuple[np.ndarray, np.ndarray]:
  tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
  loss_mask = np.concatenate([np.full(len(ids), trained) for ids, trained in parts])
  return tokens, loss_mask
