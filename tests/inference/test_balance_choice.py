"""The choice of a server in one pass against the rule written out plainly."""

import random

import pytest

from intellect3.inference import balance


def plainly(servers, *, room, now, home, spill):
  """By lists: those with room, of these the unblocked, of these home or the least busy."""
  able = [
    one
    for one in servers
    if one.listed
    and one.fenced is None
    and one.in_flight + 1 <= min(room, one.room)
    and one.full_until <= now
  ]
  able = [one for one in able if one.blocked_until <= now] or able
  if not able:
    return None
  least = min(able, key=lambda one: (one.load, one.last_used))
  homes = [one for one in able if one.url == home]
  if homes and homes[0].load <= balance.SPILL_FACTOR * least.load + spill:
    return homes[0]
  return least


@pytest.mark.parametrize("seed", range(4))
def test_one_pass_chooses_as_the_rule_says(seed):
  rng = random.Random(seed)
  chosen = set()
  for _ in range(500):
    servers = [
      balance.Server(
        f"http://{index}",
        in_flight=rng.randrange(4),
        others=rng.choice((0, 0, 5)),
        blocked_until=rng.choice((0.0, 0.0, 2.0)),
        room=rng.choice((float("inf"), 1.0, 2.5)),
        full_until=rng.choice((0.0, 0.0, 0.0, 2.0)),
        last_used=rng.randrange(100),
        listed=rng.random() < 0.9,
        fenced=rng.choice((None, None, None, "bad")),
      )
      for index in range(rng.randrange(6))
    ]
    options = {
      "room": rng.randrange(1, 5),
      "now": 1.0,
      "home": rng.choice((None, "http://0", "http://3")),
      "spill": rng.randrange(3),
    }
    picked = balance.choose({one.url: one for one in servers}, **options)
    assert picked is plainly(servers, **options)
    chosen.add(None if picked is None else picked.url == options["home"])
  assert chosen == {None, True, False}
