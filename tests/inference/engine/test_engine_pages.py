"""Pages of the cache: shared, given up, forgotten, and never lost; by hand and by Hypothesis."""

import engine_formula as formula
import pytest
from engine_formula import Formula, batcher, check_whole, finish, sequence, step

from intellect3.inference.engine.pages import Pages


def grown(pages, key, tokens, owner="writer"):
  """The nodes of a prompt, computed and held."""
  nodes = pages.find(key, tokens, len(tokens) // pages.page_size)
  pages.use(nodes)
  for page in pages.take(len(tokens) // pages.page_size - len(nodes)):
    assert pages.add(key, tokens, nodes, page, owner)
  for node in nodes:
    node.ready, node.writer = True, None
  return nodes


def test_what_is_unused_is_given_up_leaf_by_leaf_the_longest_unused_first():
  pages = Pages(6, 2)
  first, second = [1, 1, 2, 2, 3, 3], [1, 1, 4, 4]
  for tokens in (first, second):
    pages.release(grown(pages, "", tokens), None)
  assert (pages.available, pages.unused) == (6, 4)
  pages.release(grown(pages, "", first), None)  # looked up again: now the other is the oldest
  taken = pages.take(3)
  assert len(set(taken)) == 3 and pages.unused == 3
  assert len(pages.find("", second, 2)) == 1 and len(pages.find("", first, 3)) == 3
  taken += pages.take(2)
  assert len(pages.find("", first, 3)) == 1 and pages.take(2) is None and pages.available == 1
  pages.give(taken)
  assert pages.available == 6


def test_a_page_goes_right_after_the_last_one_that_continued_it():
  pages = Pages(3, 2)
  pages.release(grown(pages, "", [1, 1, 2, 2]), None)
  pages.release(grown(pages, "", [3, 3]), None)
  pages.take(2)
  assert not pages.find("", [1, 1], 1) and pages.find("", [3, 3], 1)


def test_held_nodes_are_never_given_up():
  pages = Pages(3, 2)
  held = grown(pages, "", [1, 1, 2, 2])
  assert pages.take(2) is None and pages.take(1) == [2]
  assert pages.find("", [1, 1, 2, 2], 2) == held


def test_what_was_never_computed_is_not_left_behind():
  pages = Pages(4, 2)
  nodes = []
  for page in pages.take(2):
    pages.add("", [1, 1, 2, 2], nodes, page, "writer")
  nodes[0].ready, nodes[0].writer = True, None
  pages.use(nodes)  # somebody waits for both
  pages.release(nodes, "writer")
  assert nodes[1].writer is None and pages.find("", [1, 1, 2, 2], 2) == nodes
  pages.release(nodes, "follower")
  assert pages.find("", [1, 1, 2, 2], 2) == nodes[:1] and (pages.available, pages.unused) == (4, 1)


def test_a_page_is_added_once_and_never_to_a_forgotten_tree():
  pages = Pages(4, 2)
  nodes = grown(pages, "k", [1, 1])
  page, other = pages.take(2)
  again: list = []
  assert not pages.add("k", [1, 1], again, page, None) and not again
  pages.clear()
  assert pages.find("k", [1, 1], 1) == [] and pages.epoch == 1
  assert not pages.add("k", [1, 1, 2, 2], nodes, page, None) and len(nodes) == 1
  assert pages.add("k", [1, 1], again, other, None)
  pages.release(nodes, None)
  assert pages.find("k", [1, 1], 1) == again and pages.available == 2
  pages.release(again, None)
  assert (pages.available, pages.unused) == (3, 1)


def test_wrong_sizes_are_named():
  with pytest.raises(ValueError, match="pages: expected at least 1, got 0"):
    Pages(0, 4)
  with pytest.raises(ValueError, match="page_size: expected at least 1, got 0"):
    Pages(4, 0)


def test_without_a_flush_a_retracted_sequence_finds_its_prompt_again():
  house, who = batcher(page=2, chunk=2), sequence(prompt=[1, 2, 3, 4, 5], new=6)
  device = Formula(house)
  house.add(who)
  for _ in range(4):
    step(house, device)
  house.retract()
  plan = house.plan()
  assert plan.prefill.tokens_RT[0].tolist() == [5, who.output_ids[0]]
  house.apply(plan, *device(plan), version="v", now=1.0)
  finish(house, device)
  check_whole(who)
  assert house.counters.cached == 0 and who.cached_tokens == 0, "a prompt is counted once"


def test_what_a_sequence_finds_is_told_even_where_it_was_retracted_before_it_ran():
  house = batcher(slots=2, rows=1)
  device, first = Formula(house), sequence("1", prompt=range(8), new=1)
  house.add(first)
  finish(house, device)
  # The second waits for its turn in prefill calls behind a long prompt.
  house.add(sequence("long", prompt=range(50, 70), new=1, received=1.0))
  second = sequence("2", prompt=[*range(8), 9], new=1, received=2.0)
  house.add(second)
  step(house, device)
  assert second.slot is not None and second.started is None
  house.retract()
  finish(house, device)
  assert second.cached_tokens == 8 and house.counters.cached == 8


def test_a_group_computes_its_prompt_once():
  house = batcher(slots=16, pages=64, rows=4, page=4, chunk=4, steps=4)
  device = Formula(house)
  group = [
    sequence(f"{g}.{i}", prompt=[g * 50 + p for p in range(18)], new=5, seed=i)
    for g in range(2)
    for i in range(8)
  ]
  for who in group:
    house.add(who)
  finish(house, device)
  # Four whole pages once, and the last two tokens for each of the eight.
  assert house.counters.prefilled == 2 * (16 + 8 * 2)
  assert house.counters.prompt == 16 * 18 and house.counters.cached == 2 * 7 * 16
  assert sorted(who.cached_tokens for who in group) == [0] * 2 + [16] * 14
  for who in group:
    check_whole(who)


def test_no_reuse_across_cache_keys():
  house = batcher()
  device = Formula(house)
  for index, key in enumerate(("", "a", "\ud800", "a")):
    house.add(sequence(str(index), prompt=range(8), new=1, extra_key=key))
    finish(house, device)
  assert house.counters.cached == 7, "only the last one finds its prompt, and computes its end"


@pytest.mark.parametrize(("deterministic", "cached"), [(False, 11), (True, 10)])
def test_of_a_prompt_that_is_there_only_the_end_is_computed(deterministic, cached):
  """The last token; in deterministic mode its chunk, so that it lies at its place in it."""
  house = batcher(deterministic=deterministic, chunk=2)
  device = Formula(house)
  for rid in ("1", "2"):
    who = sequence(rid, prompt=range(12), new=6)
    house.add(who)
    finish(house, device)
    check_whole(who)
  assert who.cached_tokens == house.counters.cached == cached


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_conversation_goes_on_from_whole_pages(deterministic):
  """What decoding computed is shared too, but not in deterministic mode: it rounds differently."""
  house = batcher(deterministic=deterministic)
  device = Formula(house)
  first = sequence("1", prompt=range(6), new=8)
  house.add(first)
  finish(house, device)
  second = sequence("2", prompt=[*first.tokens, 70, 71], new=4)
  house.add(second)
  finish(house, device)
  # 13 of the first one's 14 tokens were in the cache: three whole pages, one of them of its prompt.
  assert second.cached_tokens == (4 if deterministic else 12)
  check_whole(second)
  third = sequence("3", prompt=[*second.tokens], new=2)
  house.add(third)
  finish(house, device)
  # Of the 20 tokens before the last prompt's last: second's prompt is 16, its cache 19 tokens.
  assert third.cached_tokens == 16
  check_whole(third)


def test_a_conversation_goes_on_from_a_prompt_that_was_found_whole():
  """Its last token was computed twice: the experts of what follows must not be one off."""
  house = batcher()
  device = Formula(house)
  house.add(sequence("1", prompt=range(8), new=1))
  finish(house, device)
  second = sequence("2", prompt=range(8), new=9)
  house.add(second)
  finish(house, device)
  third = sequence("3", prompt=[*second.tokens, 70], new=2)
  house.add(third)
  finish(house, device)
  assert (second.cached_tokens, third.cached_tokens) == (7, 16)
  check_whole(third)


def test_what_was_begun_before_the_cache_was_forgotten_is_nobodys_prefix():
  """Even where the prompt was too short for a page that could have been forgotten."""
  house = batcher()
  device = Formula(house)
  first = sequence("1", prompt=[1, 2], new=12)
  house.add(first)
  for _ in range(4):
    step(house, device)
  house.forget_prefixes()
  finish(house, device)
  second = sequence("2", prompt=[*first.tokens, 70], new=2)
  house.add(second)
  finish(house, device)
  assert second.cached_tokens == 0


def test_nobody_is_let_in_where_those_inside_could_not_grow():
  """One page for each of them stays free, or the newcomer would be the next to go."""
  house = batcher(slots=3, pages=9, page=4, rows=4)
  device = Formula(house)
  for index, length in enumerate((11, 11, 7)):  # three, three and two pages
    house.add(sequence(str(index), prompt=range(50 * index, 50 * index + length), new=9))
  step(house, device)
  assert (house.num_running, house.num_waiting) == (2, 1)
  roomy = batcher(slots=3, pages=10, page=4, rows=4)
  for index, length in enumerate((11, 11, 7)):
    roomy.add(sequence(str(index), prompt=range(50 * index, 50 * index + length), new=9))
  step(roomy, Formula(roomy))
  assert (roomy.num_running, roomy.num_waiting) == (3, 0)


def test_logprobs_of_the_prompt_limit_what_is_reused():
  for start, cached in ((0, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (None, 11)):
    house = batcher(rows=1)
    device = Formula(house)
    house.add(sequence("1", prompt=range(12), new=1))
    finish(house, device)
    who = sequence(
      "2",
      prompt=range(12),
      new=3,
      return_logprob=True,
      logprob_start=start,
      top_logprobs_num=2,
    )
    house.add(who)
    finish(house, device)
    assert who.cached_tokens == cached, start
    check_whole(who)


def test_who_follows_an_aborted_writer_computes_the_rest():
  for rows, aborted in ((1, 1), (1, 3), (3, 1)):
    house = batcher(slots=3, rows=rows, chunk=2)
    device = Formula(house)
    group = [sequence(str(i), prompt=range(14), new=2, seed=i) for i in range(3)]
    for who in group:
      house.add(who)
    for _ in range(aborted):
      step(house, device)
    house.abort("0")
    formula.audit(house)
    finish(house, device)
    assert group[0].finish["type"] == "abort"
    for who in group[1:]:
      check_whole(who)
    assert house.counters.prefilled <= 14 + 2 * 2, "the rest is computed once"


def test_with_too_little_memory_the_youngest_goes_back_and_all_end():
  house = batcher(slots=4, pages=9, page=4, context=32, steps=4)
  device = Formula(house)
  group = [
    sequence(str(i), prompt=[i, i + 1, i + 2], new=20, seed=i, received=float(i)) for i in range(4)
  ]
  for who in group:
    house.add(who)
  done = finish(house, device)
  assert len(done) == 4 and house.counters.retractions > 0 and group[0].retractions == 0
  assert house.counters.retractions == sum(who.retractions for who in group)
  for who in group:
    check_whole(who)


def test_who_has_room_for_some_of_its_tokens_samples_those():
  house = batcher(slots=2, pages=8, page=4, context=32, steps=8)
  device = Formula(house)
  pair = [sequence(str(i), prompt=[i, 9, 9], new=29, seed=i, received=float(i)) for i in range(2)]
  for who in pair:
    house.add(who)
  step(house, device), step(house, device)
  assert [who.cached for who in pair] == [11, 11]
  plan = house.plan()
  # The older takes the last two pages; the younger has one place left in its three.
  assert [int(plan.decode.remaining_S[who.slot]) for who in pair] == [8, 1]
  house.apply(plan, *device(plan), version="v", now=1.0)
  finish(house, device)
  assert pair[0].retractions == 0 and pair[1].retractions == 1
  for who in pair:
    check_whole(who)


def test_deterministic_mode_takes_memory_for_the_whole_generation():
  house = batcher(slots=4, pages=9, page=4, context=32, steps=4, deterministic=True)
  device = Formula(house)
  for index in range(4):
    house.add(sequence(str(index), prompt=[index], new=15, seed=index, received=float(index)))
  step(house, device)
  assert house.num_running == 2 and house.num_waiting == 2
  done = finish(house, device)
  assert len(done) == 4 and house.counters.retractions == 0
