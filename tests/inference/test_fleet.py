"""The fleet against simulated servers in virtual time: joins, losses, returns, fences, delays."""

import asyncio
import itertools

import pytest
from fake_servers import FakeServer
from fleet_world import A, B, Slow, World

from intellect3.inference import fleet, weight_sync


def test_nobody_is_told_of_a_server_before_it_has_the_weights_and_each_as_soon_as_it_has():
  world = World(a=Slow(2.0), b=Slow(5.0))

  async def scenario():
    results = await world.fleet.sync(3)
    assert all(result.ok for result in results)

  world.run(scenario)
  assert world.told.versions == [(3.0, {A: 3}), (6.0, {A: 3, B: 3})]  # a canary takes a second
  assert world.fleet.states == {A: "serving", B: "serving"}


def test_the_old_version_serves_until_one_has_the_new_one():
  world = World(a=Slow(2.0), b=Slow(5.0))

  async def scenario():
    await world.fleet.sync(3)
    await world.fleet.sync(4)

  world.run(scenario)
  assert [versions for _, versions in world.told.versions] == [
    {A: 3},
    {A: 3, B: 3},
    {A: 4},
    {A: 4, B: 4},
  ]


def test_a_failure_before_any_has_the_new_version_leaves_the_others_in_use():
  dying = FakeServer()
  world = World(a=Slow(10.0), b=dying)

  async def scenario():
    await world.fleet.sync(1)
    dying.kill()
    syncing = asyncio.ensure_future(world.fleet.sync(2))
    await asyncio.sleep(5.0)
    assert world.told.now == {A: 1} and world.told.failures == [(B, 2, False)]
    await syncing
    assert world.told.now == {A: 2}

  world.run(scenario)


def test_one_that_takes_too_long_does_not_hold_the_others_and_comes_back():
  slow = Slow(0.0)
  world = World(a=Slow(2.0), b=slow)

  async def scenario():
    await world.fleet.sync(1)
    clock = asyncio.get_running_loop().time
    started = clock()
    slow.load_seconds = 400.0
    results = await world.fleet.sync(2)
    assert clock() - started == 30.0
    assert {result.url: result.ok for result in results} == {A: True, B: False}
    assert "long after others" in next(r.reason for r in results if r.url == B)
    assert world.told.now == {A: 2} and world.told.failures == [(B, 2, False)]
    slow.load_seconds = 1.0
    await world.fleet.sync(3)
    await asyncio.sleep(60.0)
    assert world.told.now == {A: 3, B: 3} and slow.version == "3"

  world.run(scenario)


def test_a_patience_grows_with_what_the_first_took():
  world = World(a=Slow(40.0), b=Slow(110.0))

  async def scenario():
    results = await world.fleet.sync(1)
    assert all(result.ok for result in results)

  world.run(scenario)


def test_a_killed_server_is_noticed_and_brought_back_with_the_weights_of_that_time():
  dying, living = FakeServer(), FakeServer()
  world = World(a=dying, b=living)

  async def scenario():
    await world.fleet.sync(1)
    dying.kill()
    await asyncio.sleep(5.0)
    assert world.told.now == {B: 1} and world.fleet.states[A].startswith("lost")
    assert world.told.failures == []  # what it made under checked weights is sound
    await world.fleet.sync(2)
    await asyncio.sleep(5.0)
    dying.log.clear()
    dying.restart()
    await asyncio.sleep(70.0)
    assert world.told.now == {A: 2, B: 2} and dying.version == "2"
    assert "/health" not in dying.log and dying.log.count("/update_weights_from_disk") == 1

  world.run(scenario)


def test_a_lost_server_is_looked_at_less_and_less_often():
  dying = FakeServer()
  world = World(a=dying, b=FakeServer())
  looks = []

  async def scenario():
    await world.fleet.sync(1)
    dying.kill()
    answer = dying.answer

    async def counted(method, path, body, timeout):
      if path == "/model_info":
        looks.append(asyncio.get_running_loop().time())
      return await answer(method, path, body, timeout)

    dying.answer = counted
    await asyncio.sleep(1000.0)

  world.run(scenario)
  waits = [later - earlier for earlier, later in itertools.pairwise(looks)][2:]
  assert waits == sorted(waits) and max(waits) >= 60.0 and len(looks) < 40


def test_a_server_that_was_restarted_between_two_looks_is_not_trusted():
  server = FakeServer()
  world = World(a=server, b=FakeServer())

  async def scenario():
    await world.fleet.sync(5)
    server.restart(version=0)
    await asyncio.sleep(1.5)
    assert world.told.now == {B: 5}
    await asyncio.sleep(10.0)
    assert world.told.now == {A: 5, B: 5} and server.version == "5"

  world.run(scenario)


def test_a_disagreeing_canary_fences_for_good_until_the_server_leaves_the_list():
  bad = FakeServer()
  bad.score_offset = -0.25
  world = World(a=bad, b=FakeServer())

  async def scenario():
    (result,) = [r for r in await world.fleet.sync(1) if r.url == A]
    assert "canary" in result.reason and result.answered
    assert world.told.failures == [(A, 1, True)] and world.told.now == {B: 1}
    bad.score_offset = 0.0
    await asyncio.sleep(200.0)
    await world.fleet.sync(2)
    assert world.told.now == {B: 2} and world.fleet.states[A].startswith("fenced")
    world.wanted = [B]
    await asyncio.sleep(2.0)
    world.wanted = [A, B]
    await asyncio.sleep(10.0)
    assert world.told.now == {A: 2, B: 2}

  world.run(scenario)


def test_servers_join_and_leave_while_the_run_goes():
  joining = FakeServer()
  world = World([A], a=FakeServer(), b=joining)

  async def scenario():
    await world.fleet.sync(7)
    world.wanted = [A, B, B]
    await asyncio.sleep(5.0)
    assert world.told.now == {A: 7, B: 7} and joining.version == "7"
    world.wanted = [B]
    await asyncio.sleep(2.0)
    assert world.told.now == {B: 7} and set(world.fleet.states) == {B}

  world.run(scenario)


def test_one_that_leaves_and_comes_back_in_the_midst_of_a_load_has_one_load_at_a_time():
  server = FakeServer()
  world = World(a=server)
  under_way, most = [0], []

  async def slowly(url, version, unusable):
    under_way[0] += 1
    most.append(under_way[0])
    await asyncio.sleep(5.0)
    under_way[0] -= 1
    server.version = str(version)
    return weight_sync.ServerSync(url, None, 5.0, {})

  world.fleet._bring = slowly

  async def scenario():
    syncing = asyncio.ensure_future(world.fleet.sync(1))
    await asyncio.sleep(0.5)
    world.wanted = []
    await asyncio.sleep(1.5)
    world.wanted = [A]
    await syncing
    await asyncio.sleep(20.0)

  world.run(scenario)
  assert most == [1] and world.told.now == {A: 1}


def test_a_server_that_joins_before_it_listens_is_waited_for():
  late = FakeServer()
  late.alive = False
  world = World([A], a=FakeServer(), b=late)

  async def scenario():
    await world.fleet.sync(1)
    world.wanted = [A, B]
    await asyncio.sleep(20.0)
    assert world.told.now == {A: 1}
    late.restart()
    await asyncio.sleep(40.0)
    assert world.told.now == {A: 1, B: 1}

  world.run(scenario)


def test_a_version_that_comes_while_a_server_joins_is_brought_before_it_serves():
  joining = Slow(10.0)
  world = World([A], a=FakeServer(), b=joining)

  async def scenario():
    await world.fleet.sync(1)
    world.wanted = [A, B]
    await asyncio.sleep(5.0)
    assert "/update_weights_from_disk" in joining.log
    await world.fleet.sync(2)
    await asyncio.sleep(30.0)

  world.run(scenario)
  assert world.told.now == {A: 2, B: 2}
  assert all(versions.get(B) in (None, 2) for _, versions in world.told.versions)


def test_when_all_are_lost_that_is_told_and_the_first_to_return_is_used():
  server = FakeServer()
  world = World(a=server)

  async def scenario():
    await world.fleet.sync(1)
    server.kill()
    await asyncio.sleep(5.0)
    assert world.told.now == {}
    assert await world.fleet.sync(2) == []
    server.restart()
    await asyncio.sleep(70.0)
    assert world.told.now == {A: 2}

  world.run(scenario)


def test_a_paused_server_is_left_alone():
  server = Slow(20.0)
  world = World(a=server, b=Slow(1.0))

  async def scenario():
    await world.fleet.sync(1)
    server.log.clear()
    await world.fleet.sync(2)
    return list(server.log)

  log = world.run(scenario)
  pause, resume = log.index("/pause_generation"), log.index("/continue_generation")
  assert log[pause : resume + 1] == [
    "/pause_generation",
    "/end_weight_update",
    "/update_weights_from_disk",
    "/continue_generation",
  ]


def test_a_version_that_is_refused_fences_all():
  world = World(a=FakeServer(), b=FakeServer())

  async def scenario():
    await world.fleet.sync(1)
    results = world.fleet.refuse(2, "fingerprints differ")
    assert [result.reason for result in results] == [
      f"{url}: weights v2: fingerprints differ" for url in (A, B)
    ]
    assert world.told.now == {}

  world.run(scenario)


def test_loads_and_counters_are_passed_on():
  first, second = FakeServer(), FakeServer()
  world = World(a=first, b=second)
  first.states = [{"running_requests": 3, "waiting_requests": 2, "reprefilled_tokens": 100}]
  second.states, second.loads = [{}], [{"num_running_reqs": 4, "num_waiting_reqs": 1}] * 2

  async def scenario():
    await world.fleet.sync(1)
    await asyncio.sleep(2.5)
    first.states[0]["reprefilled_tokens"] = 130
    await asyncio.sleep(2.0)
    assert world.fleet.take_counted() == {"reprefilled_tokens": 30}
    assert world.fleet.take_counted() == {}
    first.states[0]["reprefilled_tokens"] = 7  # it began anew
    await asyncio.sleep(2.0)
    assert world.fleet.take_counted() == {"reprefilled_tokens": 7}

  world.run(scenario)
  assert world.told.busy[-1] == {A: (3, 2), B: (8, 2)}


def test_a_server_that_tells_no_load_is_not_lost():
  server = FakeServer()
  world = World(a=server)
  server.states = [{}]

  async def scenario():
    await world.fleet.sync(1)
    await asyncio.sleep(20.0)
    assert world.told.now == {A: 1}

  world.run(scenario)


@pytest.mark.parametrize("field", ["poll_seconds", "lost_after", "patience_seconds"])
def test_bad_settings_are_named(field):
  with pytest.raises(ValueError, match=field):
    fleet.Settings(**{field: 0})
