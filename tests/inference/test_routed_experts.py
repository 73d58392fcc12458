"""Routed experts: what a server tells is checked, and each token keeps what its call used."""

import base64
import json
import pathlib

import msgspec
import numpy as np
import pytest
from fake_servers import FakeServer, FakeTransport, generate, make_pool, run_virtual

from intellect3.inference import routed_experts
from intellect3.inference.protocol import ProtocolError
from intellect3.types import RouterShape

GOLDEN = pathlib.Path("tests/data/sglang/goldens/generate_routed_experts.json")
ROUTER = RouterShape(num_layers=3, num_dense_layers=1, num_experts=300, num_experts_per_token=2)


def told(whole_TLA):
  return base64.b64encode(np.asarray(whole_TLA, "<i4").tobytes()).decode()


def experts_at(positions, call):
  """[T, layers, A]: what a call tells of these positions; the dense layer is zeros."""
  whole_TLA = np.zeros((len(positions), 3, 2), np.int32)
  for row, position in enumerate(positions):
    whole_TLA[row, 1:, 0] = position % 100, 100 + position % 100
    whole_TLA[row, 1:, 1] = 200 + call
  return whole_TLA


class Telling(FakeServer):
  """Tells routed experts, of which the call's number is one."""

  heeds_start = True

  def _reply(self, body, start, count, finish):
    reply = super()._reply(body, start, count, finish)
    if count:
      first = body["routed_experts_start_len"] if self.heeds_start else 0
      whole_TLA = experts_at(range(first, start + count - 1), len(self.seen) - 1)
      reply["meta_info"]["routed_experts"] = told(whole_TLA)
    return reply


def calls_of(generation):
  """The call that each recorded position is of, after checking the rest."""
  experts_TLA = generation.routed_experts
  assert experts_TLA.dtype == np.uint16 and experts_TLA.shape[1:] == (2, 2)
  return (experts_TLA[:, 0, 1] - 200).tolist()


def test_what_sglang_recorded_is_read():
  exchange = json.loads(GOLDEN.read_text())
  router = RouterShape(num_layers=2, num_dense_layers=1, num_experts=8, num_experts_per_token=2)
  told = exchange["response"]["meta_info"]["routed_experts"]
  experts_TLA = routed_experts.decode(told, tokens=12, router=router)
  assert experts_TLA.shape == (12, 1, 2) and experts_TLA.dtype == np.uint8
  assert experts_TLA[:3, 0].tolist() == [[5, 6], [5, 6], [4, 3]]


@pytest.mark.parametrize(
  ("experts", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65535, np.uint16)]
)
def test_the_dtype_holds_every_expert(experts, dtype):
  router = RouterShape(
    num_layers=1, num_dense_layers=0, num_experts=experts, num_experts_per_token=1
  )
  decoded = routed_experts.decode(told([[[experts - 1]]]), tokens=1, router=router)
  assert decoded.dtype == dtype and decoded.tolist() == [[[experts - 1]]]


def test_segments_record_each_token_once_with_the_call_that_sampled_after_it():
  server = Telling()
  pool = make_pool(FakeTransport(a=server), segment_tokens=4, router=ROUTER)
  generation, _ = run_virtual(generate(pool, max_new_tokens=10))
  # Prompt 3, then segments of 4, 4 and 2: the first call computes 3 + 3 tokens.
  assert calls_of(generation) == [0] * 6 + [1] * 4 + [2] * 2
  assert generation.routed_experts[:, 0, 0].tolist() == list(range(12))
  assert generation.routed_experts[:, 1, 0].tolist() == list(range(100, 112))
  assert [body["routed_experts_start_len"] for body in server.seen] == [0, 6, 10]


def test_a_continuation_and_a_known_prefix_are_not_told_again():
  servers = {"a": Telling(), "b": Telling()}
  servers["a"].script.append(("abort", 2))
  pool = make_pool(FakeTransport(**servers), router=ROUTER)
  generation, _ = run_virtual(generate(pool, known_tokens=2, max_new_tokens=6))
  assert len(generation.tokens) == 6 and len(generation.servers) == 2
  assert generation.routed_experts[:, 0, 0].tolist() == list(range(2, 8))
  starts = [body["routed_experts_start_len"] for s in servers.values() for body in s.seen]
  assert starts == [2, 4]


def test_an_abort_without_tokens_records_nothing():
  server = Telling()
  server.script.append(("abort", 0))
  pool = make_pool(FakeTransport(a=server), router=ROUTER)
  generation, _ = run_virtual(generate(pool))
  assert calls_of(generation) == [1] * 8


def test_weights_that_were_a_mixture_end_what_is_recorded():
  server = Telling()

  def mix(reply):
    reply["meta_info"]["weight_versions"] = [
      {"version": "0", "start": 0, "end": 2},
      {"version": "unchecked-1", "start": 2, "end": len(reply["output_ids"])},
    ]
    server.mutate = None

  server.mutate = mix
  pool = make_pool(FakeTransport(a=server), router=ROUTER)
  generation, _ = run_virtual(generate(pool))
  assert calls_of(generation) == [0] * 4 + [1] * 4


def test_what_an_earlier_process_had_comes_with_its_experts():
  pool = make_pool(FakeTransport(a=Telling()), router=ROUTER)
  so_far, _ = run_virtual(generate(pool, max_new_tokens=4))
  server = Telling()
  pool = make_pool(FakeTransport(a=server), router=ROUTER)
  generation, _ = run_virtual(generate(pool, max_new_tokens=6, so_far=so_far))
  assert generation.routed_experts[:, 0, 0].tolist() == list(range(8))
  assert server.seen[0]["routed_experts_start_len"] == 6
  bare = msgspec.structs.replace(so_far, routed_experts=None)
  with pytest.raises(ValueError, match=r"so_far\.routed_experts"):
    run_virtual(generate(pool, max_new_tokens=6, so_far=bare))


def test_a_server_that_tells_none_fails_the_generation_by_name():
  pool = make_pool(FakeTransport(a=FakeServer()), router=ROUTER)
  with pytest.raises(routed_experts.RoutedExpertsMissing, match=r"a: routed_experts: .*got none"):
    run_virtual(generate(pool))


def test_nothing_is_asked_for_where_nothing_is_replayed():
  server = FakeServer()
  generation, _ = run_virtual(generate(make_pool(FakeTransport(a=server))))
  assert generation.routed_experts is None
  assert not [name for name in server.seen[0] if "routed" in name]


def test_a_server_that_does_not_heed_the_start_is_refused():
  server = Telling()
  server.heeds_start = False
  pool = make_pool(FakeTransport(a=server), segment_tokens=4, router=ROUTER)
  with pytest.raises(ProtocolError, match=r"int32\[2, 3, 2\], 48 bytes, got 192"):
    run_virtual(generate(pool))


@pytest.mark.parametrize(
  ("place", "value", "named"),
  [
    ((1, 2, 0), 300, "got 100 to 300"),
    ((1, 1, 0), -1, "got -1 to"),
    ((0, 0, 1), 1, "zeros in the first 1 layers"),
    ((1, 1, 0), 207, "one twice"),
  ],
)
def test_choices_that_cannot_be_are_refused(place, value, named):
  whole_TLA = experts_at([0, 101], 7)
  whole_TLA[:, 1, 0] += 100
  assert routed_experts.decode(told(whole_TLA), tokens=2, router=ROUTER).shape == (2, 2, 2)
  whole_TLA[place] = value
  with pytest.raises(ProtocolError, match=named):
    routed_experts.decode(told(whole_TLA), tokens=2, router=ROUTER)


@pytest.mark.parametrize("text", ["????", "AAA", "AAAA", "\udc80"])
def test_what_is_no_array_is_refused(text):
  with pytest.raises(ProtocolError, match="routed_experts: expected"):
    routed_experts.decode(text, tokens=1, router=ROUTER)
