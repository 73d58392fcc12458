"""Supervised examples from the environments' own demonstrations, for a warm-up before RL."""

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from intellect3.pipeline import sft_source
from intellect3.rendering.base import Renderer
from intellect3.types import Task


class Demonstrator(Protocol):
  """An environment that can show an answer."""

  @property
  def name(self) -> str: ...

  def size(self, split: str) -> int: ...

  def task(self, split: str, index: int) -> Task: ...

  def demonstration(self, task: Task, rng: random.Random) -> str: ...


def demonstrations(
  *,
  environments: Sequence[Demonstrator],
  renderer: Renderer,
  environment_weights: Mapping[str, float] | None = None,
  seed: int = 0,
) -> sft_source.Example:
  """Examples of one turn: a training task's prompt, and a demonstrated answer, which is trained on.

  Args:
    environments: where tasks and answers come from.
    renderer: chat format.
    environment_weights: share of each by name; equal by default.
    seed: example n is the same for the same seed.

  Raises:
    ValueError: no environment, or weights of other ones.
  """
  by_name = {environment.name: environment for environment in environments}
  weights = dict(environment_weights or dict.fromkeys(by_name, 1.0))
  if not by_name or set(weights) != set(by_name):
    raise ValueError(
      f"environment_weights: expected {sorted(by_name)}, at least one, got {sorted(weights)}"
    )
  names = sorted(by_name)

  def example(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = random.Random(f"{seed}/demonstration/{number}")
    environment = by_name[rng.choices(names, [weights[name] for name in names])[0]]
    task = environment.task("train", rng.randrange(environment.size("train")))
    prompt = renderer.render(task.prompt)
    answer = renderer.completion(environment.demonstration(task, rng))
    tokens = np.array([*prompt, *answer], np.int32)
    return tokens, np.arange(len(tokens)) >= len(prompt)

  return example
