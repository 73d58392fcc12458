"""reverse_text and arithmetic: tasks, splits, scores, demonstrations."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intellect3.environments import splits
from intellect3.environments.arithmetic import Arithmetic
from intellect3.environments.base import Reply, Score
from intellect3.environments.reverse_text import ReverseText, similarity

ENVIRONMENTS = [ReverseText(), Arithmetic()]


class Says:
  """A conversation whose assistant says one thing."""

  def __init__(self, content):
    self.content = content
    self.sent = []

  async def send(self, messages, *, tools=None, max_new_tokens=None):
    self.sent.append(messages)
    return Reply(content=self.content)


def score(environment, task, content):
  return asyncio.run(environment.run(task, Says(content)))


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e.name)
def test_tasks_are_stable_and_splits_disjoint(environment):
  texts = {}
  for split in ("train", "eval"):
    tasks = [environment.task(split, index) for index in range(400)]
    assert tasks == [environment.task(split, index) for index in range(400)]
    assert len({task.task_id for task in tasks}) == 400
    assert all(task.environment == environment.name for task in tasks)
    texts[split] = {task.prompt[0]["content"] for task in tasks}
  assert not texts["train"] & texts["eval"]
  assert len(texts["eval"]) > 200


def test_a_task_by_value():
  # Pinned: a change here would change every run and could move held-out words into training.
  task = ReverseText().task("eval", 0)
  assert (task.prompt[0]["content"], task.task_id) == ("cag", "reverse_text/eval/0")


def test_a_tenth_of_the_texts_is_held_out():
  held_out = sum(splits.split_of(str(number)) == "eval" for number in range(10_000))
  assert 900 < held_out < 1100


def test_words_are_of_the_alphabet_and_lengths():
  environment = ReverseText(letters="xyz", min_length=2, max_length=4)
  words = {environment.task("train", i).prompt[0]["content"] for i in range(300)}
  assert {len(word) for word in words} == {2, 3, 4}
  assert {letter for word in words for letter in word} == set("xyz")


def test_reverse_text_scores():
  environment = ReverseText()
  task = environment.task("train", 3)
  word = task.prompt[0]["content"]
  assert score(environment, task, word[::-1]).reward == 1.0
  wrong = score(environment, task, word + "x")
  assert wrong.reward == 0.0 and 0.0 < wrong.metrics["lcs"] < 1.0
  assert score(environment, task, word).metrics["copied"] == 1.0
  graded = score(ReverseText(reward="lcs"), task, word[::-1] + "x")
  assert graded.reward == pytest.approx(len(word) / (len(word) + 1))


def longest_common_subsequence(a, b):
  if not a or not b:
    return 0
  if a[0] == b[0]:
    return 1 + longest_common_subsequence(a[1:], b[1:])
  return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_similarity_against_its_definition(a, b):
  expected = longest_common_subsequence(a, b) / max(len(a), len(b)) if a or b else 1.0
  assert similarity(a, b) == expected


def test_arithmetic_answers():
  environment = Arithmetic(max_operand=30)
  negative = 0
  for index in range(200):
    task = environment.task("train", index)
    problem = task.prompt[0]["content"]
    assert problem.endswith("=")
    assert task.info["answer"] == str(eval(problem[:-1]))
    negative += task.info["answer"].startswith("-")
  assert negative > 10
  assert score(environment, task, task.info["answer"]).reward == 1.0
  assert score(environment, task, task.info["answer"] + " ").reward == 0.0


@pytest.mark.parametrize(
  ("environment", "wrong"),
  [
    (ReverseText(demonstration_accuracy=0.4), lambda task: {task.info["word"]}),
    (
      Arithmetic(demonstration_accuracy=0.4),
      lambda task: {str(int(task.info["answer"]) + d) for d in (-1, 1)},
    ),
  ],
  ids=lambda value: getattr(value, "name", ""),
)
def test_demonstrations_are_right_as_often_as_asked(environment, wrong):
  rng = random.Random(0)
  right = total = 0
  for index in range(2000):
    task = environment.task("train", index)
    answer, shown = task.info["answer"], environment.demonstration(task, rng)
    if answer in wrong(task):
      continue  # a palindrome tells nothing
    total += 1
    right += shown == answer
    assert shown == answer or shown in wrong(task)
  assert right / total == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize(
  ("call", "field"),
  [
    (lambda: ReverseText(letters="aa"), "letters"),
    (lambda: ReverseText(min_length=4, max_length=3), "min_length"),
    (lambda: ReverseText(reward="fuzzy"), "reward"),
    (lambda: ReverseText(demonstration_accuracy=1.5), "demonstration_accuracy"),
    (lambda: ReverseText(num_tasks=0), "num_tasks"),
    (lambda: Arithmetic(max_operand=0), "max_operand"),
    (lambda: Arithmetic(operations="*"), "operations"),
    (lambda: ReverseText().task("test", 0), "split"),
    (lambda: ReverseText().size("test"), "split"),
    (lambda: ReverseText().task("train", -1), "index"),
    (lambda: ReverseText(letters="ab", min_length=1, max_length=1).task("eval", 0), "split"),
    (lambda: Score(reward=float("nan")), "reward"),
  ],
)
def test_bad_settings_are_named(call, field):
  with pytest.raises(ValueError, match=field):
    call()
