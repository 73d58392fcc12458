"""The compiled prefill and decode against the trainer's own forward pass, and what their bits may
depend on."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import engine_formula as formula
import jax
import numpy as np
import pytest
from engine_serve import (
  CONFIG,
  CONTEXT,
  PAGE,
  SHAPE,
  TOP,
  house,
  make_device,
  prompt_of,
  serve,
)
from engine_trainer import Trainer, log_softmax

from intellect3.inference.engine.control import MEMORY_TAGS
from intellect3.inference.engine.device import Device
from intellect3.inference.engine.steps import MAX_STOP_IDS
from intellect3.models import presets
from tests.models import helpers

PARAMS = helpers.random_params(CONFIG)
TRAINER = Trainer(CONFIG, PARAMS)


@pytest.fixture(scope="module")
def device():
  """Compiled once; tests leave it with PARAMS and whatever cache."""
  return make_device(CONFIG, PARAMS)


def mixed_arrivals():
  """A group, a longer member, prompts that are scored, a greedy one, one that is a page exactly."""
  common = prompt_of(21)
  return [
    (0, formula.sequence("group 1", common, 12, seed=1)),
    (0, formula.sequence("group 2", common, 20, seed=2, top_logprobs_num=2)),
    (1, formula.sequence("longer", [*common, *prompt_of(9, 1)], 17, seed=3, temperature=0.7)),
    (2, formula.sequence("scored", common, 5, seed=4, logprob_start=0, top_logprobs_num=TOP)),
    (2, formula.sequence("partly", common[:19], 5, seed=4, logprob_start=10)),
    (4, formula.sequence("greedy", prompt_of(3, 2), 30, temperature=0.0, top_logprobs_num=1)),
    (5, formula.sequence("page", common[:16], 9, seed=5)),
    (5, formula.sequence("page again", common[:16], 9, seed=6)),
  ]


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_told_is_what_the_trainer_computes(device, deterministic):
  rooms = house(deterministic=deterministic)
  served = serve(device, mixed_arrivals(), rooms)
  for who in served.values():
    TRAINER.check(who)
  assert rooms.counters.cached > 60
  greedy = served["greedy"]
  logits, _ = TRAINER.logits(greedy.tokens[:-1])
  assert greedy.output_ids == logits[2:].argmax(axis=1).tolist()


@pytest.mark.parametrize(
  "family", [presets.tiny_qwen3, pytest.param(presets.tiny_qwen3_moe, marks=pytest.mark.slow)]
)
def test_other_families_are_told_as_the_trainer_computes_them(family):
  config = family(vocab_size=CONFIG.vocab_size, embed_dim=32)
  params = helpers.random_params(config)
  trainer = Trainer(config, params)
  for who in serve(make_device(config, params), mixed_arrivals(), house()).values():
    trainer.check(who)


def test_with_too_little_memory_the_same_tokens_come(device):
  """Retracted sequences compute anew; only the rounding may differ."""
  arrivals = lambda: [  # noqa: E731
    (0, formula.sequence(str(seed), prompt_of(6, seed), 40, seed=seed, received=float(seed)))
    for seed in range(6)
  ]
  plenty, rooms = serve(device, arrivals(), house()), house(pages=10)
  scarce = serve(device, arrivals(), rooms)
  assert rooms.counters.retractions > 0 and rooms.counters.reprefilled > 0
  for rid, who in scarce.items():
    assert who.output_ids == plenty[rid].output_ids
    TRAINER.check(who)


def test_a_conversation_that_goes_on_from_the_cache_is_computed_right(device):
  rooms = house()
  first = formula.sequence("1", prompt_of(9), 20)
  serve(device, [(0, first)], rooms)
  second = formula.sequence("2", [*first.tokens, *prompt_of(6, 1)], 12, seed=3)
  serve(device, [(0, second)], rooms)
  assert second.cached_tokens == 24
  TRAINER.check(second)


def bits(who):
  """All that a reply could tell of a sequence."""
  return (
    *(who.output_ids, who.output_logprobs, who.output_top, who.input_logprobs, who.input_top),
    np.concatenate(who.experts).tolist(),
  )


def test_several_steps_in_a_call_are_several_calls(device):
  runs = [
    serve(device, mixed_arrivals(), house(deterministic=True, steps=steps)) for steps in (1, 3, 4)
  ]
  for other in runs[1:]:
    assert all(bits(other[rid]) == bits(who) for rid, who in runs[0].items())


def random_neighbour(rng, index, own):
  """Any request; half of them share some of the other's prompt or all of it."""
  prompt = prompt_of(rng.integers(1, 30), seed=100 + index)
  if rng.random() < 0.5:
    prompt = own[: rng.integers(1, len(own) + 1)] + prompt * int(rng.random() < 0.5)
  wishes = {
    "top_k": int(rng.integers(0, 5)),
    "top_p": float(rng.choice([1.0, 0.7])),
    "min_p": float(rng.choice([0.0, 0.1])),
    "frequency_penalty": float(rng.choice([0.0, 1.0])),
    "repetition_penalty": float(rng.choice([1.0, 1.3])),
    "top_logprobs_num": int(rng.integers(0, TOP + 1)),
    "temperature": float(rng.choice([0.0, 0.5, 1.0])),
    "min_new_tokens": 1,
    "stop_token_ids": frozenset(rng.integers(0, CONFIG.vocab_size, 3).tolist()),
    "logprob_start": int(rng.integers(0, len(prompt))) if rng.random() < 0.3 else None,
  }
  if rng.random() < 0.5:
    wishes = {}
  new = int(rng.integers(1, min(25, CONTEXT - len(prompt))))
  return formula.sequence(f"n{index}", prompt, new, seed=int(rng.integers(1000)), **wishes)


ROUNDS = 8
WISHES = [
  {},
  {"top_logprobs_num": 2, "logprob_start": 0},
  {"top_p": 0.8, "top_k": 20, "temperature": 1.3},
  {"frequency_penalty": 0.5, "presence_penalty": 0.2, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("wishes", WISHES)
def test_in_deterministic_mode_a_reply_does_not_depend_on_the_house(device, wishes):
  """Alone; and in full houses of random neighbours, joining at random moments, where its prompt is
  being computed by somebody, was computed by somebody, or is new."""
  length = 24 if not wishes else 19
  own = prompt_of(length, seed=7)
  alone = bits(serve(device, [(0, formula.sequence("own", own, 21, **wishes))])["own"])
  rng, cached = np.random.default_rng(len(wishes)), 0
  for _ in range(ROUNDS):
    arrivals = [(int(rng.integers(0, 12)), random_neighbour(rng, index, own)) for index in range(9)]
    mine = (int(rng.integers(0, 12)), formula.sequence("own", own, 21, **wishes))
    arrivals.insert(int(rng.integers(0, 10)), mine)
    rooms = house(deterministic=True)
    assert bits(serve(device, arrivals, rooms)["own"]) == alone
    cached += rooms.counters.cached
  assert cached > 0


def test_a_member_of_a_group_does_not_know_whether_it_came_first(device):
  """The prompt is whole pages: even of those only the end is computed again, at its old place."""
  group = lambda order: [  # noqa: E731
    (0, formula.sequence(str(seed), prompt_of(2 * PAGE), 12, seed=seed)) for seed in order
  ]
  forth, back = (serve(device, group(order)) for order in (range(6), reversed(range(6))))
  late = [(4 * at, who) for at, (_, who) in enumerate(group(range(6)))]
  spread = serve(device, late)
  for seed in range(6):
    assert bits(forth[str(seed)]) == bits(back[str(seed)]) == bits(spread[str(seed)])


def penalized(logits, counts, request):
  out = logits.copy()
  for index in np.flatnonzero(counts):
    out[index] -= counts[index] * request.frequency_penalty + request.presence_penalty
    factor = request.repetition_penalty
    out[index] = out[index] / factor if out[index] > 0 else out[index] * factor
  return out


@pytest.mark.parametrize("events", [(), ((5, lambda rooms: rooms.retract()),)])
def test_penalties_count_what_was_sampled_also_over_a_retraction(device, events):
  """Slots are used again and again, so counts of earlier tenants would show."""
  wishes = {"frequency_penalty": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.4}
  arrivals = [
    (index, formula.sequence(str(index), prompt_of(5, index), 22, temperature=0.0, **wishes))
    for index in range(6)
  ]
  served = serve(device, arrivals, house(), events)
  assert any(who.retractions for who in served.values()) == bool(events)
  for who in served.values():
    logits, _ = TRAINER.logits(who.tokens[:-1])
    counts = np.zeros(CONFIG.vocab_size, int)
    for place, (token, logprob) in enumerate(
      zip(who.output_ids, who.output_logprobs, strict=True), len(who.request.input_ids) - 1
    ):
      changed = penalized(logits[place], counts, who.request)
      assert token == changed.argmax()
      np.testing.assert_allclose(logprob, log_softmax(changed)[token], atol=1e-5)
      counts[token] += 1
    assert counts.max() < 22


def test_stop_ids_end_a_generation_in_the_call_or_after_it(device):
  free = serve(device, [(0, formula.sequence("free", prompt_of(5), 12, temperature=0.0))])["free"]
  stop = free.output_ids[5]
  wanted = free.output_ids[: free.output_ids.index(stop) + 1]
  for others in (0, 3 * MAX_STOP_IDS):
    # The many come from beyond the vocabulary, so that only the one can be met.
    ids = frozenset(range(1000, 1000 + others)) | {stop}
    cut = formula.sequence("cut", prompt_of(5), 12, temperature=0.0, stop_token_ids=ids)
    serve(device, [(0, cut)])
    assert cut.output_ids == wanted and cut.finish == {"type": "stop", "matched": stop}
    assert cut.output_logprobs == free.output_logprobs[: len(wanted)]
    TRAINER.check(cut)


def test_who_ignores_stop_ids_is_not_held_up_by_them(device):
  for ignore, lengths in ((True, [4, 4, 3]), (False, [2])):
    rooms, found = house(), []
    free = serve(device, [(0, formula.sequence("free", prompt_of(5), 12))])["free"]
    wishes = {"stop_token_ids": frozenset(free.output_ids[2:3]), "ignore_eos": ignore}
    rooms.add(formula.sequence("r", prompt_of(5), 12, **wishes))
    while not rooms.idle:
      plan = rooms.plan()
      results = device.run(plan)
      if results[1] is not None:
        found.append(int(results[1].lengths_S.max()))
      rooms.apply(plan, *results, version="v", now=1.0)
    assert found == lengths


def test_before_the_minimum_stop_ids_are_not_sampled(device):
  free = serve(device, [(0, formula.sequence("free", prompt_of(5), 12, temperature=0.0))])["free"]
  stops = frozenset(free.output_ids[:3])
  bound = formula.sequence(
    "bound", prompt_of(5), 20, temperature=0.0, stop_token_ids=stops, min_new_tokens=6
  )
  serve(device, [(0, bound)])
  assert not stops & set(bound.output_ids[:6])
  logits, _ = TRAINER.logits(bound.tokens[:-1])
  for place, token in enumerate(bound.output_ids):
    row = logits[4 + place].copy()
    if place < 6:
      row[list(stops)] = -1e30
    assert token == row.argmax()
    np.testing.assert_allclose(bound.output_logprobs[place], log_softmax(row)[token], atol=1e-5)


def test_nothing_is_sampled_where_nothing_is_asked_for(device):
  who = formula.sequence("none", prompt_of(9), 0, logprob_start=0)
  serve(device, [(0, who)])
  assert who.output_ids == [] and who.finish == {"type": "length", "length": 0}
  logits, experts = TRAINER.logits(who.tokens)
  expected = log_softmax(logits)[np.arange(8), who.request.input_ids[1:]]
  np.testing.assert_allclose(who.input_logprobs, expected, atol=1e-5)
  np.testing.assert_array_equal(np.concatenate(who.experts), experts)


def test_the_cache_stays_where_it_is(device):
  """Donated and updated in place: nothing as large as the cache is ever allocated."""
  place = lambda: [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(device._state)]  # noqa: E731
  before = place()
  serve(device, mixed_arrivals())
  assert place() == before
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(device._state))
  for name, executable in device._executables.items():
    assert executable.memory_analysis().alias_size_in_bytes == size, name


def test_new_weights_are_served_without_compiling(device):
  other, compiled = helpers.random_params(CONFIG, seed=9), device.compiled
  who = formula.sequence("r", prompt_of(5), 12)
  try:
    device.swap(device.prepare(other))
    serve(device, [(0, who)])
  finally:
    device.swap(device.prepare(PARAMS))
  Trainer(CONFIG, other).check(who)
  assert device.compiled == compiled and len(compiled) == 3


def test_weights_that_do_not_fit_are_named_and_not_served(device):
  def changed(change):
    params = jax.tree.map(lambda leaf: leaf, PARAMS)
    change(params)
    return params

  for change, message in [
    (lambda p: p.pop("head"), r"head: expected float32\[32, 97\] as served, got nothing"),
    (lambda p: p.update(more=np.zeros(3, "f")), r"more: expected nothing as served, got float32"),
    (lambda p: p.update(head=p["head"].T), r"head: expected float32\[32, 97\] .* got float32\[97"),
    (lambda p: p.update(head=p["head"].astype(np.float16)), "head: .* got float16"),
  ]:
    with pytest.raises(ValueError, match=message):
      device.prepare(changed(change))


@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"], list(MEMORY_TAGS)])
def test_released_memory_comes_back_as_it_was(device, tags):
  free = serve(device, [(0, formula.sequence("r", prompt_of(9), 9))])["r"]
  device.release(tags)
  device.release(tags)
  assert device.released == set(tags)
  given = [device._state] * ("kv_cache" in tags) + [device._params] * ("weights" in tags)
  assert given == [None] * len(tags)
  for leaf, expected in zip(
    jax.tree.leaves(device.host_params()), jax.tree.leaves(PARAMS), strict=True
  ):
    np.testing.assert_array_equal(leaf, expected)
  device.resume(tags)
  assert not device.released
  if "kv_cache" in tags:
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(device._state))
  again = serve(device, [(0, formula.sequence("r", prompt_of(9), 9))])["r"]
  assert bits(again) == bits(free)


def test_weights_that_come_while_theirs_are_released_are_those_that_stay(device):
  other = helpers.random_params(CONFIG, seed=9)
  try:
    device.release(["weights"])
    device.swap(device.prepare(other))
    device.resume(["weights"])
    who = formula.sequence("r", prompt_of(5), 6)
    serve(device, [(0, who)])
    Trainer(CONFIG, other).check(who)
  finally:
    device.swap(device.prepare(PARAMS))


def test_impossible_sizes_are_named():
  def make(config=CONFIG, **more):
    sizes = {"slots": 1, "pages": 2, "page_size": 8, "context_length": 16, "shape": SHAPE}
    return Device(config, PARAMS, **{**sizes, **more})

  short = dataclasses.replace(CONFIG, max_positions=16)
  with pytest.raises(ValueError, match=r"context_length: expected 2 to 16 .* got 17"):
    make(short, context_length=17)
  with pytest.raises(ValueError, match=r"context_length: expected 2 to .* got 1"):
    make(context_length=1)
  with pytest.raises(ValueError, match=r"tp_size: expected 1 to 1 \(devices\), got 2"):
    make(tensor_parallel=2)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_over_several_devices_the_same_is_computed(count):
  """Four fake devices in a process of their own; weights and cache are split over some of them."""
  here = pathlib.Path(__file__).resolve()
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
    "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[3])]),
  }
  command = [sys.executable, str(here.parent / "sharded_device.py"), str(count)]
  run = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert run.returncode == 0 and run.stdout.strip() == "equal", run.stderr[-3000:]
