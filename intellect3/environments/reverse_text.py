"""Reverse a word. The smallest task that a policy can be warmed up to half-know."""

import random
from dataclasses import dataclass

from intellect3.environments import splits
from intellect3.environments.base import Conversation, Score
from intellect3.types import Task


@dataclass(frozen=True)
class ReverseText:
  """The prompt is a word, the answer is the word reversed.

  Attributes:
    letters: the alphabet.
    min_length: shortest word; lengths are drawn uniformly.
    max_length: longest word.
    name: name in the run's mix.
    reward: `exact` (1 for the reversed word, else 0) or `lcs` (length of the longest common
      subsequence over that of the longer text, in [0, 1]).
    demonstration_accuracy: share of demonstrations that reverse; the others copy the word.
    num_tasks: indices per split.
  """

  letters: str = "abcdefghij"
  min_length: int = 3
  max_length: int = 5
  name: str = "reverse_text"
  reward: str = "exact"
  demonstration_accuracy: float = 1.0
  num_tasks: int = 1_000_000

  def __post_init__(self) -> None:
    if len(self.letters) < 2 or len(set(self.letters)) != len(self.letters):
      raise ValueError(f"letters: expected two or more different ones, got {self.letters!r}")
    if not 1 <= self.min_length <= self.max_length:
      raise ValueError(
        "min_length, max_length: expected 1 <= min_length <= max_length, "
        f"got {self.min_length}, {self.max_length}"
      )
    if self.reward not in ("exact", "lcs"):
      raise ValueError(f"reward: expected 'exact' or 'lcs', got {self.reward!r}")
    if not 0.0 <= self.demonstration_accuracy <= 1.0:
      raise ValueError(
        f"demonstration_accuracy: expected a share in [0, 1], got {self.demonstration_accuracy}"
      )
    if self.num_tasks < 1:
      raise ValueError(f"num_tasks: expected at least 1, got {self.num_tasks}")

  def size(self, split: str) -> int:
    """Indices in the split; words repeat where there are fewer of them."""
    splits.check_split(split)
    return self.num_tasks

  def task(self, split: str, index: int) -> Task:
    """The word at an index; `info` holds `word` and `answer`."""
    key = f"{self.name}/{self.letters}/{self.min_length}-{self.max_length}"
    word = splits.draw(split, index, size=self.num_tasks, key=key, text=self._word)
    return Task(
      task_id=f"{self.name}/{split}/{index}",
      environment=self.name,
      prompt=[{"role": "user", "content": word}],
      info={"word": word, "answer": word[::-1]},
    )

  async def run(self, task: Task, conversation: Conversation) -> Score:
    """One turn; metrics: `exact`, `lcs`, `copied` (the word unreversed)."""
    reply = await conversation.send(task.prompt)
    word, answer = task.info["word"], task.info["answer"]
    metrics = {
      "exact": float(reply.content == answer),
      "lcs": similarity(reply.content, answer),
      "copied": float(reply.content == word),
    }
    return Score(reward=metrics[self.reward], metrics=metrics)

  def demonstration(self, task: Task, rng: random.Random) -> str:
    """An answer for supervised warm-up: reversed with `demonstration_accuracy`, else copied."""
    right = rng.random() < self.demonstration_accuracy
    return task.info["answer"] if right else task.info["word"]

  def _word(self, rng: random.Random) -> str:
    length = rng.randint(self.min_length, self.max_length)
    return "".join(rng.choice(self.letters) for _ in range(length))


def similarity(text: str, answer: str) -> float:
  """Longest common subsequence over the longer length; 1.0 for equal texts, also empty ones."""
  row = [0] * (len(answer) + 1)
  for character in text:
    previous = 0
    for position, expected in enumerate(answer, start=1):
      above = row[position]
      row[position] = previous + 1 if character == expected else max(above, row[position - 1])
      previous = above
  longer = max(len(text), len(answer))
  return row[-1] / longer if longer else 1.0
