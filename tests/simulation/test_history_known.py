"""Histories that once went wrong, by hand: what was found by searching stays found."""

import asyncio

import pytest

from intellect3.rollouts import messages
from intellect3.simulation import clock
from tests.rollouts.world import World
from tests.simulation.history_events import History
from tests.simulation.history_ledger import Config


@pytest.fixture
def begin():
  """Makes histories whose workers are there and whose servers have v0."""
  made = []

  def make(workers=1, servers=1, **config):
    history = History(Config(**config), workers=workers, servers=servers)
    made.append(history)
    for _ in range(workers):
      history.join()
    for _ in range(servers):
      history.bring(0, "ok")
    return history

  yield make
  for history in made:
    history.close()


def all_end(history, pattern=0x555):
  history.finish(0, 100, pattern, "ok", "old", False)


def test_new_weights_while_no_server_is_there_wait_for_one(begin):
  history = begin(off_policy=0)
  history.server_lost(0, False)
  all_end(history)
  history.write(0, "ok")
  history.land("ok")
  history.train(1)  # the sync finds nobody to bring v1 to
  history.wait(50.0)
  assert not history.over
  history.server_back(0)
  assert history.counts()["in_flight"] == 2
  history.finish_everything()


@pytest.mark.parametrize("what", ["worker", "server"])
def test_a_run_without_any_ends_with_the_reason_when_patience_is_over(begin, what):
  history = begin()
  if what == "worker":
    history.leave(0)
  else:
    history.server_lost(0, False)
  history.wait(99.0)
  assert not history.over
  history.wait(2.0)
  assert f"no {what} is left, for 100 s" in str(history.task.exception())


def test_one_that_comes_back_in_time_is_enough(begin):
  history = begin()
  history.leave(0)
  history.wait(99.0)
  history.join()
  history.wait(99.0)
  assert not history.over
  history.finish_everything()


def test_a_result_that_is_told_twice_counts_once(begin):
  history = begin(workers=2)
  history.finish(0, 1, 1, "ok", "old", True)
  history.hear(0, True)
  assert history.machine._holdings.load == {"worker_0": 1, "worker_1": 2}


def test_a_result_of_the_life_before_is_nobodys(begin):
  history = begin()
  history.finish(0, 1, 1, "ok", "old", True)
  history.restart(True)  # the same numbers are dispatched again; the ghost speaks before
  history.join()
  history.bring(0, "ok")
  history.ghost()
  assert history.ledger.attempts[0].fate == "running"
  history.finish_everything()


def test_what_a_fenced_server_made_is_let_go_of_by_its_worker(begin):
  history = begin(prompts=2, group=3)
  history.finish(0, 2, 1, "ok", "old", False)
  history.server_lost(0, True)
  assert history.links["worker_0"].held == set()
  assert history.counts()["errored"] == 2


def test_room_made_by_what_went_stale_is_taken_at_once(begin):
  """A group straggles until it is too old; the plan that drops it makes room for another."""
  history = begin(prompts=1, off_policy=1, in_flight=24, steps=9)
  history.straggle(4, 2, 0x555, "old")
  history.bring(0, "ok")
  assert history.counts()["stale"] > 0
  history.finish_everything()


def test_a_shard_holds_what_was_asked_for_whatever_is_let_go_of_in_the_same_breath(tmp_path):
  async def main():
    said = []
    made = World(tmp_path).make_worker()(said.append)
    dispatch = messages.Dispatch(
      rollout_id=0, group_id=0, sample=0, environment="coin", split="train", index=0, seed=1,
      temperature=1.0,
    )  # fmt: skip
    made.handle(dispatch)
    await asyncio.sleep(1.0)
    items = [messages.BatchItem(0, 0.5)]
    made.handle(messages.WriteBatch(step=1, attempt=1, items=items, oldest_version=0))
    made.handle(messages.Forget(rollout_ids=[0]))
    await asyncio.sleep(1.0)
    await made.close()
    return said

  summary, written = clock.run(main())
  assert summary.rollout_id == 0
  assert isinstance(written, messages.BatchWritten) and list(written.shard.lengths) == [6]
