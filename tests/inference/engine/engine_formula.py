"""A device that is a formula, with a memory that remembers what was written where.

It samples by seed and position alone, as the contract allows, and keeps for every place of the
cache which prefix (under which cache key) was written there, so that a call that reads anything but
the sequence's own past through its page table fails.
"""

import itertools

import numpy as np

from intellect3.inference.engine.batcher import Batcher
from intellect3.inference.engine.pages import Pages
from intellect3.inference.engine.request import Request
from intellect3.inference.engine.sequence import Sequence
from intellect3.inference.engine.steps import Decoded, Prefilled, Top, empty_sampling

LAYERS, ACTIVE, ALTERNATIVES = 2, 1, 3


def request(rid="r", prompt=(1, 2, 3), new=4, **more):
  values = {"temperature": 1.0, **more}
  return Request(rid=rid, input_ids=list(prompt), max_new_tokens=new, **values)


def sequence(rid="r", prompt=(1, 2, 3), new=4, *, seed=9, received=0.0, **more):
  return Sequence(request(rid, prompt, new, **more), seed=(7 << 32) | seed, received=received)


def next_token(seed: int, position: int) -> int:
  return 100 + ((seed & 0xFFFF_FFFF) * 31 + position * 7) % 50


def expert_of(token: int, position: int) -> int:
  return token * 1000 + position


def chain(key: str, tokens) -> list[int]:
  """What the cache holds at each position of a sequence: a name of all that came before."""
  names = itertools.accumulate(tokens, lambda name, token: hash((name, token)), initial=hash(key))
  return list(names)[1:]


class Formula:
  """Computes plans; raises where one reads what was never written for it."""

  def __init__(self, house: Batcher, *, experts=True):
    self.pages, self.page_size = house.pages, house.pages.page_size
    self.chunk, self.deterministic = house._chunk, house._deterministic
    self.experts = experts
    self.cells: dict[tuple[int, int], tuple[int, int, str]] = {}
    self.decode_positions = 0

  def __call__(self, plan) -> tuple[Prefilled | None, Decoded | None]:
    prefilled = None if plan.prefill is None else self._prefill(plan)
    return prefilled, None if plan.decode is None else self._decode(plan)

  def _at(self, table, position: int) -> tuple[int, int]:
    return int(table[position // self.page_size]), position % self.page_size

  def _check(self, who: Sequence, table, length: int) -> None:
    names = chain(who.request.extra_key, who.tokens[:length])
    for position, name in enumerate(names):
      found, version, kind = self.cells[self._at(table, position)]
      assert found == name, f"{who.request.rid} reads another's cache at {position}"
      assert version >= who.epoch, f"{who.request.rid} reads what was forgotten at {position}"
      if self.deterministic and position < len(who.request.input_ids):
        assert kind == "prefill", f"{who.request.rid} shares what decoding computed at {position}"

  def _prefill(self, plan) -> Prefilled:
    call = plan.prefill
    length = call.tokens_RT.shape[1]
    assert (
      not call.valid_RT[len(plan.chunks) :].any() and not call.samples_R[len(plan.chunks) :].any()
    )
    for row, (who, start, end) in enumerate(plan.chunks):
      count = end - start
      assert 0 < count <= length
      # Where bits count, a token lies at the same place of its chunk whoever computes it.
      assert start % self.chunk == 0 or (not self.deterministic and start == who.length - 1)
      assert call.valid_RT[row].tolist() == [i < count for i in range(length)]
      assert call.positions_RT[row, :count].tolist() == list(range(start, end))
      assert call.tokens_RT[row, :count].tolist() == who.tokens[start:end]
      assert call.slots_R[row] == who.slot and call.last_R[row] == count - 1
      assert bool(call.samples_R[row]) == (end == who.length)
      for position, name in enumerate(
        chain(who.request.extra_key, who.tokens[:end])[start:], start
      ):
        self.cells[self._at(call.tables_RW[row], position)] = (name, self.pages.epoch, "prefill")
    for row, (who, _, end) in enumerate(plan.chunks):
      self._check(who, call.tables_RW[row], end)
    tokens_R, logprobs_R = self._sample(call.sampling)
    scores = call.targets_RT.astype(np.float32) + call.positions_RT / 1024 if call.score else None
    experts = expert_of(call.tokens_RT.astype(np.int64), call.positions_RT)
    top = bool(call.sampling.top)
    return Prefilled(
      tokens_R=tokens_R,
      logprobs_R=logprobs_R,
      top=_top(tokens_R) if top else None,
      input_logprobs_RT=scores,
      input_top=_top(call.targets_RT) if top and call.score else None,
      experts_LRTA=self._layers(experts),
    )

  def _decode(self, plan) -> Decoded:
    call = plan.decode
    slots = len(call.tokens_S)
    shape = (int(call.steps), slots)
    out = Decoded(
      tokens_NS=np.full(shape, -1, np.int32),
      logprobs_NS=np.zeros(shape, np.float32),
      lengths_S=np.zeros(slots, np.int32),
      top=None,
      experts_NLSA=np.zeros((shape[0], LAYERS, slots, ACTIVE), np.int64) if self.experts else None,
    )
    held = {who.slot: who for who in plan.decoding}
    assert {slot for slot in range(slots) if call.remaining_S[slot] > 0} == set(held)
    tokens = call.tokens_S.copy()
    remaining, positions = call.remaining_S.copy(), call.sampling.positions_R.copy()
    names = {slot: chain(w.request.extra_key, w.tokens)[-1] for slot, w in held.items()}
    for slot, who in held.items():
      assert call.positions_S[slot] == who.length - 1 and tokens[slot] == who.output_ids[-1]
      assert positions[slot] == len(who.output_ids)
    for step in range(call.steps):
      if (remaining > 0).sum() < max(int(call.quorum), 1):
        break
      sampled, logprobs = self._sample(call.sampling._replace(positions_R=positions))
      for slot in np.flatnonzero(remaining > 0):
        who, count = held[slot], int(out.lengths_S[slot])
        position = int(call.positions_S[slot]) + count
        self.cells[self._at(call.tables_SW[slot], position)] = (
          names[slot],
          self.pages.epoch,
          "decode",
        )
        if count == 0:
          self._check(who, call.tables_SW[slot], who.length)
        if self.experts:
          out.experts_NLSA[step, :, slot] = expert_of(int(tokens[slot]), position)
        tokens[slot] = sampled[slot]
        names[slot] = hash((names[slot], int(sampled[slot])))
        out.tokens_NS[step, slot], out.logprobs_NS[step, slot] = sampled[slot], logprobs[slot]
        out.lengths_S[slot] += 1
        ended = call.ends_S[slot] and sampled[slot] in call.sampling.stops_RJ[slot]
        remaining[slot] = 0 if ended else remaining[slot] - 1
        positions[slot] += 1
        self.decode_positions += 1
    return out._replace(top=_top(out.tokens_NS)) if call.sampling.top else out

  def _sample(self, sampling):
    low_R = sampling.seeds_R2[:, 1].tolist()
    ids = [
      next_token(low, position)
      for low, position in zip(low_R, sampling.positions_R.tolist(), strict=True)
    ]
    return np.asarray(ids, np.int32), -np.asarray(ids, np.float32)

  def _layers(self, experts_RT):
    if not self.experts:
      return None
    return np.broadcast_to(experts_RT[None, ..., None], (LAYERS, *experts_RT.shape, ACTIVE))


def _top(ids) -> Top:
  ids = np.asarray(ids)[..., None] + np.arange(ALTERNATIVES)
  return Top(-ids.astype(np.float32), ids)


def batcher(*, slots=2, pages=16, page=4, rows=2, chunk=4, context=32, steps=1, **more) -> Batcher:
  return Batcher(
    slots=slots,
    pages=Pages(pages, page),
    context_length=context,
    prefill_rows=rows,
    prefill_chunk=chunk,
    decode_steps=steps,
    **more,
  )


def step(house: Batcher, device: Formula, version="v", now=1.0) -> list[Sequence]:
  plan = house.plan()
  return [] if plan is None else house.apply(plan, *device(plan), version=version, now=now)


def finish(house: Batcher, device: Formula, version="v") -> list[Sequence]:
  done: list[Sequence] = []
  for _ in range(10_000):
    if house.idle:
      return done
    done += step(house, device, version)
    audit(house)
  raise AssertionError("the batcher does not come to an end")


def audit(house: Batcher) -> None:
  """Every page is free, or held by one sequence alone, or one node; the counts are right."""
  pages = house.pages
  holders = [*house._prefilling, *house._decoding]
  nodes = {}

  def walk(node):
    for name, child in node.children.items():
      assert child.parent is node and child.key == name
      nodes[id(child)] = child
      walk(child)

  for root in pages._roots.values():
    assert root.children and root.epoch == pages.epoch
    walk(root)
  for who in holders:
    assert [node.page for node in who.nodes] == who.pages[: len(who.nodes)]
    nodes.update((id(node), node) for node in who.nodes)
  private = [page for who in holders for page in who.pages[len(who.nodes) :]]
  everything = sorted([*pages._free, *private, *(node.page for node in nodes.values())])
  assert everything == list(range(pages.count)), "a page is lost or held twice"
  unused = [node for node in nodes.values() if node.users == 0]
  for node in nodes.values():
    assert node.users == sum(node in who.nodes for who in holders)
    assert node.ready or (node.users and (node.writer is None or node in node.writer.nodes))
    assert not node.ready or node.parent.page == -1 or node.parent.ready
    assert not node.ready or node.writer is None
  assert pages.unused == len(unused) and pages.available == len(pages._free) + len(unused)
  assert set(pages._leaves) == {node.page for node in unused if not node.children}
  slots = [who.slot for who in holders]
  assert sorted([*slots, *house._free]) == list(range(len(slots) + len(house._free)))
  assert all(not who.pages and who.slot is None for who in house._waiting)


def empty_row(sampling) -> dict[str, np.ndarray]:
  """What a row says that wants nothing besides its temperature, seed and place."""
  fresh = empty_sampling(1)._asdict()
  left_out = ("seeds_R2", "positions_R", "temperatures_R")
  return {
    name: fresh[name][0] for name in sampling._fields if fresh[name].ndim and name not in left_out
  }


def expected_ids(who):
  return [next_token(who.seed, position) for position in range(who.request.max_new_tokens)]


def check_whole(who, experts=True):
  """A finished sequence has what its formula says: tokens, logprobs, spans, scores, experts."""
  output, prompt = who.output_ids, list(who.request.input_ids)
  assert output == expected_ids(who)[: len(output)]
  assert who.output_logprobs == [-float(token) for token in output]
  assert who.spans[0][1] == 0 and who.spans[-1][2] == len(output)
  assert all(before[2] == after[1] for before, after in itertools.pairwise(who.spans))
  if who.request.top_logprobs_num:
    count = who.request.top_logprobs_num
    assert who.output_top == [[(-float(t + i), t + i) for i in range(count)] for t in output]
  first = who.first_scored
  if first is not None:
    scored = range(first, len(prompt))
    assert who.input_logprobs == [prompt[t] + (t - 1) / 1024 for t in scored]
    if who.request.top_logprobs_num:
      assert [row[0][1] for row in who.input_top] == [prompt[t] for t in scored]
  if experts:
    given = np.concatenate(who.experts)
    tokens = (prompt + output)[:-1] if output else prompt
    told = [expert_of(token, position) for position, token in enumerate(tokens)]
    assert given.shape == (len(tokens), LAYERS, ACTIVE)
    assert (given == np.asarray(told)[:, None, None]).all()
