"""Sums and differences of small whole numbers, such as `12+7=`."""

import random
from dataclasses import dataclass

from intellect3.environments import splits
from intellect3.environments.base import Conversation, Score
from intellect3.types import Task

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b}


@dataclass(frozen=True)
class Arithmetic:
  """The prompt is `a+b=` or `a-b=`, the answer a decimal number, a leading minus where negative.

  Attributes:
    max_operand: operands are drawn uniformly from 0 to this, both included.
    operations: those used, from `+` and `-`.
    name: name in the run's mix.
    demonstration_accuracy: share of demonstrations that are right; the others are off by one.
    num_tasks: indices per split.
  """

  max_operand: int = 99
  operations: str = "+-"
  name: str = "arithmetic"
  demonstration_accuracy: float = 1.0
  num_tasks: int = 1_000_000

  def __post_init__(self) -> None:
    if self.max_operand < 1:
      raise ValueError(f"max_operand: expected at least 1, got {self.max_operand}")
    if not self.operations or set(self.operations) - set(_OPERATIONS):
      raise ValueError(f"operations: expected some of '+-', got {self.operations!r}")
    if not 0.0 <= self.demonstration_accuracy <= 1.0:
      raise ValueError(
        f"demonstration_accuracy: expected a share in [0, 1], got {self.demonstration_accuracy}"
      )
    if self.num_tasks < 1:
      raise ValueError(f"num_tasks: expected at least 1, got {self.num_tasks}")

  def size(self, split: str) -> int:
    """Indices in the split; problems repeat where there are fewer of them."""
    splits.check_split(split)
    return self.num_tasks

  def task(self, split: str, index: int) -> Task:
    """The problem at an index; `info` holds `answer`."""
    key = f"{self.name}/{self.operations}/{self.max_operand}"
    problem = splits.draw(split, index, size=self.num_tasks, key=key, text=self._problem)
    operation = next(sign for sign in _OPERATIONS if sign in problem)
    a, b = problem.removesuffix("=").split(operation)
    return Task(
      task_id=f"{self.name}/{split}/{index}",
      environment=self.name,
      prompt=[{"role": "user", "content": problem}],
      info={"answer": str(_OPERATIONS[operation](int(a), int(b)))},
    )

  async def run(self, task: Task, conversation: Conversation) -> Score:
    """One turn; the reward is 1 for exactly the answer, else 0."""
    reply = await conversation.send(task.prompt)
    exact = float(reply.content == task.info["answer"])
    return Score(reward=exact, metrics={"exact": exact})

  def demonstration(self, task: Task, rng: random.Random) -> str:
    """An answer for supervised warm-up: right with `demonstration_accuracy`, else off by one."""
    answer = int(task.info["answer"])
    if rng.random() < self.demonstration_accuracy:
      return str(answer)
    return str(answer + (1 if rng.random() < 0.5 else -1))

  def _problem(self, rng: random.Random) -> str:
    a, b = rng.randint(0, self.max_operand), rng.randint(0, self.max_operand)
    return f"{a}{rng.choice(self.operations)}{b}="
