"""Task sampling: epochs without repetition, mixes, pools, state."""

import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from intellect3.rollouts import difficulty


def make_sampler(sizes, weights=None, seed=0, **pools):
  return difficulty.TaskSampler(
    sizes, weights or dict.fromkeys(sizes, 1.0), difficulty.Pools(**pools), seed
  )


@hypothesis.given(st.integers(1, 300), st.integers(0, 5))
def test_an_epoch_has_every_task_once_and_the_next_one_another_order(size, seed):
  sampler = make_sampler({"a": size}, seed=seed)
  first = [sampler.draw(n)[1] for n in range(size)]
  second = [sampler.draw(size + n)[1] for n in range(size)]
  assert sorted(first) == sorted(second) == list(range(size))
  if size > 20:
    assert first != second


def test_the_mix_follows_the_weights():
  sampler = make_sampler({"a": 10**6, "b": 10**6}, {"a": 3.0, "b": 1.0})
  drawn = collections.Counter(sampler.draw(n)[0] for n in range(4000))
  assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_pools_take_their_share_and_normal_tasks_exclude_them():
  sampler = make_sampler(
    {"a": 100}, easy_threshold=0.9, hard_threshold=0.1, easy_fraction=0.25, hard_fraction=0.5
  )
  for index in range(10):
    sampler.update("a", index, 1.0)
    sampler.update("a", 10 + index, 0.0)
  drawn = [sampler.draw(n)[1] for n in range(2000)]
  assert sum(i < 10 for i in drawn) / 2000 == pytest.approx(0.25, abs=0.04)
  assert sum(10 <= i < 20 for i in drawn) / 2000 == pytest.approx(0.5, abs=0.04)
  sampler.update("a", 3, 0.5)
  assert sampler.counts() == {"easy": 9, "hard": 10}


def test_state_goes_on_where_it_was():
  one = make_sampler({"a": 37}, easy_threshold=1.0)
  for n in range(11):
    one.draw(n)
  one.update("a", 5, 1.0)
  two = make_sampler({"a": 37}, easy_threshold=1.0)
  two.restore(one.state())
  assert [one.draw(n) for n in range(11, 80)] == [two.draw(n) for n in range(11, 80)]


def test_other_environments_than_before_are_refused():
  sampler = make_sampler({"a": 3})
  with pytest.raises(ValueError, match="the run had \\['b'\\]"):
    sampler.restore({"cursor": {"b": 0}, "members": {"b": []}})


@pytest.mark.parametrize(
  "pools",
  [
    {"easy_fraction": 1.5},
    {"easy_fraction": 0.6, "hard_fraction": 0.6},
    {"easy_threshold": 0.2, "hard_threshold": 0.5},
  ],
)
def test_bad_pools_are_named(pools):
  with pytest.raises(ValueError, match="Pools"):
    difficulty.Pools(**pools)
