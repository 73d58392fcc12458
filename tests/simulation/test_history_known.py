"""Histories that once went wrong, by hand: what was found by searching stays found."""

import asyncio

import pytest

from intellect3.rollouts import difficulty, messages
from intellect3.simulation import clock
from tests.rollouts.world import World
from tests.simulation.history_records import Config
from tests.simulation.history_tasks import SIZES
from tests.simulation.history_turns import History


@pytest.fixture
def begin():
  """Makes histories whose workers are there and whose servers have v0."""
  made = []

  def make(workers=1, servers=1, **config):
    history = History(Config(**config), workers=workers, servers=servers)
    made.append(history)
    for _ in range(workers):
      history.join()
    serve(history)
    return history

  yield make
  for history in made:
    history.close()


def serve(history):
  """Servers do all that they are asked to."""
  while not history.over and any(double.calls for double in history.doubles.values()):
    history.bring(0)


def all_end(history, pattern=0x555):
  history.finish(0, 100, pattern, "ok", "old", False)


def test_new_weights_while_no_server_is_there_wait_for_one(begin):
  history = begin(off_policy=0)
  all_end(history)
  history.write(0, "ok")
  history.lose(0)
  history.land("ok")
  history.train(1, False)  # the sync finds nobody to bring v1 to
  history.wait(20.0)
  assert not history.over and history.counts()["in_flight"] == 0
  history.back(0, True)
  history.wait(40.0)
  serve(history)
  assert history.counts()["in_flight"] == 2
  history.finish_everything()


@pytest.mark.parametrize("what", ["worker", "server"])
def test_a_run_without_any_ends_with_the_reason_when_patience_is_over(begin, what):
  history = begin()
  if what == "worker":
    history.leave(0)
  else:
    history.lose(0)
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
  history.echo(0)
  assert history.machine._holdings.load == {"worker_0": 1, "worker_1": 2}


def test_a_result_of_the_life_before_is_nobodys(begin):
  history = begin()
  history.finish(0, 1, 1, "ok", "old", True)
  history.restart(True)  # the same numbers are dispatched again; the ghost speaks before
  history.join()
  serve(history)
  history.ghost()
  assert history.ledger.attempts[0].fate == "running"
  history.finish_everything()


def test_what_a_fenced_server_made_is_let_go_of_by_its_worker(begin):
  """A second server passes its canary late; the first fails its own, and its tokens of v1 go."""
  history = begin(servers=2, prompts=2, group=3, drop_zero=False)
  all_end(history)
  history.write(0, "ok")
  history.land("ok")
  history.train(1, False)
  history.bring(1)
  for call in (history.pause, history.load, history.resume):
    call(0, "ok")
  history.finish(0, 2, 1, "ok", "fresh", False)
  assert len(history.links["worker_0"].held) == 2
  errored = history.counts()["errored"]
  history.canary(0, "wrong")
  assert len(history.links["worker_0"].held) == 1 and history.counts()["errored"] == errored + 1


def test_room_made_by_what_went_stale_is_taken_at_once(begin):
  """A group straggles until it is too old; the plan that drops it makes room for another."""
  history = begin(prompts=1, off_policy=1, in_flight=24, steps=9)
  history.straggle(4, 2, 0x555, "old")
  serve(history)
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


def test_a_worker_that_is_gone_cannot_end_the_run(begin):
  history = begin(workers=2)
  all_end(history)
  history.write(0, "fails late")
  history.leave(0)
  history.ghost()
  assert not history.over
  history.finish_everything()


def test_a_server_that_fails_where_nobody_uses_it_makes_room_at_once(begin):
  """It has the new weights and runs what it ran, but did not pass: others serve already, so that
  nobody is told of other servers when it fails."""
  history = begin(servers=2, off_policy=0, drop_zero=False, decay=0.5)
  all_end(history)
  history.write(0, "ok")
  history.land("ok")
  history.train(1, False)
  history.bring(1)
  for call in (history.pause, history.load, history.resume):
    call(0, "ok")
  history.end(2, 1.0, "ok", "fresh", False)  # made by the first server
  history.end(3, None, "error", "fresh", False)
  told, started = history.told, history.counts()["dispatched"]
  history.canary(0, "lost")
  assert history.told == told and history.counts()["dispatched"] == started + 2
  history.finish_everything()


def test_servers_left_paused_go_on_with_the_next_orchestrator(begin):
  history = begin(servers=2)
  all_end(history)
  history.write(0, "ok")
  history.land("ok")
  history.train(1, False)
  history.pause(0, "ok")
  history.pause(0, "ok")
  history.load(0, "ok")
  history.restart(False)
  assert [double.paused for double in history.doubles.values()] == [True, True]
  history.resume(0, "ok")
  history.resume(0, "ok")
  assert not any(double.paused for double in history.doubles.values())
  history.finish_everything()


def test_the_last_normal_task_is_found_across_epochs():
  """Each epoch has its own order: as many draws as there are tasks need not be all of them."""
  for seed in range(40):
    pools = difficulty.Pools(easy_threshold=1.0)
    sampler = difficulty.TaskSampler({"word": 5}, {"word": 1.0}, pools, seed)
    first = [sampler.draw(group)[1] for group in range(3)]
    normal = sampler.draw(3)[1]
    for index in {0, 1, 2, 3, 4} - {normal}:
      sampler.update("word", index, 1.0)
    assert [sampler.draw(group)[1] for group in range(4, 7)] == [normal] * 3, (seed, first)
    sampler.update("word", normal, 1.0)
    with pytest.raises(difficulty.NoTasksLeft):
      sampler.draw(7)


def test_the_share_of_an_empty_pool_is_not_given_to_another():
  pools = difficulty.Pools(
    easy_threshold=1.0, hard_threshold=0.0, easy_fraction=0.5, hard_fraction=0.1
  )
  sampler = difficulty.TaskSampler({"word": 100}, {"word": 1.0}, pools, 0)
  sampler.update("word", 7, 0.0)
  drawn = [sampler.draw(group)[1] for group in range(1000)]
  assert 60 < drawn.count(7) < 140  # a tenth, where more than half would be the other's too


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, None], [None, None]])
def test_an_evaluation_counts_what_failed_and_scores_it_not(begin, rewards):
  history = begin(evaluation=1)
  assert history.phase == "evaluating" and set(SIZES) >= {"coin/eval", "word/eval"}
  for reward in rewards:
    history.score(0, reward, True)
  for _ in rewards:
    history.hear(0, False)
  assert history.phase == "training" and history.ledger.exams.told == [0]
  history.finish_everything()
  assert history.ledger.exams.told == [0, 3]


def test_a_worker_that_fails_while_the_servers_are_waited_for_ends_the_run():
  history = History(Config(), workers=1, servers=1)
  try:
    history.join()
    failed = messages.WorkerFailed(worker="worker_0", reason="no such environment")
    history.machine.received("worker_0", failed)
    history.excuse = "no such environment"
    history.bring(0)  # it goes on, and the run begins
    assert history.over and "worker_0: no such environment" in str(history.task.exception())
  finally:
    history.close()


def test_held_out_tasks_of_a_lost_worker_go_to_another(begin):
  history = begin(workers=2, evaluation=1)
  history.leave(0)
  assert sorted(history.links["worker_1"].exams) == [-2, -1]
  for _ in range(2):
    history.score(0, 1.0, False)
  assert history.phase == "training"


def test_a_run_without_workers_ends_with_the_reason_whatever_its_servers_do(begin):
  history = begin(workers=2, servers=2)
  history.forsake()
  assert "no worker is left, for 100 s" in str(history.task.exception())
