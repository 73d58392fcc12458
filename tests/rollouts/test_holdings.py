"""The orchestrator's book of who runs what."""

from intellect3.rollouts import holdings


def test_the_least_busy_worker_is_given_work_the_first_by_name_of_equals():
  book = holdings.Holdings()
  for name in ("c", "a", "b"):
    book.add_worker(name)
  assert [book.assign(number, continued=False) for number in range(4)] == ["a", "b", "c", "a"]
  book.release(1)
  assert [book.assign(number, continued=False) for number in range(4, 7)] == ["b", "b", "c"]
