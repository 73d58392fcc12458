"""The batcher and its pages under Hypothesis: whatever comes and goes, in any order."""

import engine_formula as formula
from engine_formula import Formula, batcher, check_whole, finish, next_token, sequence, step
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

PROMPTS = [list(range(base, base + 24)) for base in (0, 0, 200, 300)]
PROMPTS[1][5:] = PROMPTS[2][5:]  # parts from the first after a page or two


class House(RuleBasedStateMachine):
  """Whatever comes, goes, is taken back or forgotten, in any order: pages are neither lost nor held
  twice, nobody reads another's cache, and every sequence ends with the tokens of its seed."""

  @initialize(
    slots=st.integers(1, 5),
    page=st.sampled_from([2, 4]),
    chunk=st.sampled_from([1, 2]),
    rows=st.integers(1, 4),
    steps=st.sampled_from([1, 2, 5]),
    spare=st.integers(0, 3),
    deterministic=st.booleans(),
  )
  def build(self, slots, page, chunk, rows, steps, spare, deterministic):
    self.house = batcher(
      slots=slots,
      pages=-(-32 // page) + spare,
      page=page,
      context=32,
      rows=rows,
      chunk=chunk,
      steps=steps,
      deterministic=deterministic,
      match_stop=lambda ids, strings: strings[0] if ids[-1] % 11 == 0 else None,
    )
    self.device, self.deterministic = Formula(self.house), deterministic
    self.sequences, self.done, self.retracted, self.clock = [], [], 0, 0.0

  @rule(
    prompt=st.sampled_from(PROMPTS),
    lengths=st.lists(st.integers(1, 22), min_size=1, max_size=5),
    new=st.integers(0, 30),
    key=st.sampled_from(["", "", "other"]),
    start=st.sampled_from([None, None, None, 0, 3, 20]),
    stop=st.sampled_from([(), (), (), ("x",)]),
    ids=st.sampled_from([(), (), (next_token(3, 2),)]),
    tick=st.booleans(),
    penalty=st.sampled_from([0.0, 0.0, 1.0]),
  )
  def add(self, prompt, lengths, new, key, start, stop, ids, tick, penalty):
    """Several that begin alike, each with a seed of its own."""
    for seed, length in enumerate(lengths):
      self.clock += tick
      who = sequence(
        str(len(self.sequences)),
        prompt[:length],
        min(new, 32 - length),
        seed=seed,
        received=self.clock,
        extra_key=key,
        logprob_start=None if start is None or start >= length else start,
        stop_strings=stop,
        stop_token_ids=frozenset(ids),
        frequency_penalty=penalty,
        top_logprobs_num=seed % 3,
      )
      self.sequences.append(who)
      self.house.add(who)

  @precondition(lambda self: self.done)
  @rule(index=st.integers(0, 100), more=st.integers(1, 5))
  def go_on(self, index, more):
    """The next turn of a conversation."""
    before = self.done[index % len(self.done)]
    tokens = [*before.tokens, *range(400, 400 + more)][:28]
    new = min(9, 32 - len(tokens))
    who = sequence(str(len(self.sequences)), tokens, new, seed=1, received=self.clock)
    self.sequences.append(who)
    self.house.add(who)

  @rule(times=st.integers(1, 6))
  def step(self, times):
    for _ in range(times):
      self.done += step(self.house, self.device, str(self.house.pages.epoch))

  @precondition(lambda self: self.sequences)
  @rule(index=st.integers(0, 100))
  def abort(self, index):
    self.done += self.house.abort(str(index % len(self.sequences)))

  @rule()
  def retract(self):
    self.retracted += self.house.retract()

  @rule()
  def forget(self):
    self.house.forget_prefixes()

  @invariant()
  def pages_are_in_order(self):
    if hasattr(self, "house"):
      formula.audit(self.house)

  def teardown(self):
    if not hasattr(self, "house"):
      return
    self.done += finish(self.house, self.device)
    assert len(self.done) == len(set(map(id, self.done))) == len(self.sequences)
    counters = self.house.counters
    assert self.house.pages.available == self.house.pages.count
    assert counters.retractions == sum(who.retractions for who in self.sequences)
    if self.deterministic:
      assert counters.retractions == self.retracted
    assert counters.generated == sum(len(who.output_ids) for who in self.sequences)
    for who in self.sequences:
      if who.finish["type"] != "abort":
        check_whole(who)
        expected = who.request.max_new_tokens
        if who.finish["type"] == "length":
          assert len(who.output_ids) == expected


House.TestCase.settings = settings(
  max_examples=50,
  stateful_step_count=30,
  deadline=None,
  suppress_health_check=[HealthCheck.too_slow],
)
TestHouse = House.TestCase
