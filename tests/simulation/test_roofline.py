"""The roofline of decoding, on a model whose figures fit on a page."""

import dataclasses

import pytest

from intellect3.models import presets
from intellect3.planning import hardware
from intellect3.simulation import roofline

ROUND = hardware.Hardware(
  memory=1_000_000,
  node=8,
  matrix_rate={"bf16": 1e9, "f32": 1e9},
  memory_rate=1e6,
  inner=1e6,
  outer=1e6,
  host=1e6,
  host_memory=1e6,
  latency=1e-3,
  launch=1e-4,
  matrix_share=0.5,
  kernel_share=0.5,
  memory_share=0.5,
  link_share=0.5,
)
# One dense layer and one of 4 experts, 2 a token: worked by hand.
MODEL = presets.tiny(
  vocab_size=10,
  embed_dim=8,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=16,
  expert_mlp_dim=4,
  num_experts=4,
  num_experts_per_token=2,
)


def test_sizes_are_those_counted_by_hand():
  of = roofline.sizes(MODEL)
  attention = 2 * (8 * 8 + 8 * 8 + 8 * 4 + 8 * 4)  # q, o, k, v of two layers
  dense, shared, router, head = 3 * 8 * 16, 3 * 8 * 4, 4 * 8, 10 * 8
  assert of.always == attention + dense + shared + router + head == 976
  assert of.expert == 3 * 8 * 4
  assert of.cache_bytes == 2 * 2 * 4 * 2  # keys and values, two layers, one head of 4, two bytes
  assert of.heads_dim == 2 * 8


def test_the_parameters_are_those_that_the_checkpoint_of_106b_has():
  of = roofline.sizes(presets.glm_4_5_air())
  embedding = 151552 * 4096
  assert of.parameters + embedding == pytest.approx(106.85e9, rel=1e-3)


def test_a_step_of_one_request_reads_the_weights_that_it_uses_and_its_cache():
  of = roofline.sizes(MODEL)
  moved = (976 + 2 * 96) * 2 + 50 * of.cache_bytes  # two of four experts
  launches = 2 * roofline.KERNELS_PER_LAYER * 1e-4
  assert roofline.step_seconds(of, ROUND, devices=1, running=1, context=50) == pytest.approx(
    moved / 0.5e6 + launches
  )


def test_many_requests_read_all_experts_once():
  of = roofline.sizes(MODEL)
  few, many = (roofline.step_seconds(of, ROUND, devices=1, running=n) for n in (30, 60))
  assert many == pytest.approx(few, rel=1e-6)
  assert many == pytest.approx((976 + 4 * 96) * 2 / 0.5e6 + 24e-4, rel=1e-6)


def test_matrices_bound_the_step_where_they_take_longer():
  of = roofline.sizes(MODEL)
  slow = dataclasses.replace(ROUND, matrix_rate={"bf16": 1e5, "f32": 1e5})
  flops = 60 * 2 * (976 + 2 * 96)
  assert roofline.step_seconds(of, slow, devices=1, running=60) == pytest.approx(
    flops / 0.5e5 + 24e-4
  )


def test_devices_share_the_bytes_and_pay_for_the_links():
  of = roofline.sizes(MODEL)
  sent = 2 * 1 * 8 * 2 / 0.5e6
  assert roofline.step_seconds(of, ROUND, devices=2, running=1) == pytest.approx(
    (976 + 2 * 96) * 2 / 2 / 0.5e6 + 4 * (1e-3 + sent) + 24e-4
  )


def test_the_table_and_the_cost_of_the_cache_are_the_step_taken_apart():
  of = roofline.sizes(presets.glm_4_5_air())
  h200 = hardware.load("h200")
  rate = roofline.decode_tokens_per_second(of, h200, devices=8, running=[100])[0]
  cached = roofline.seconds_per_cached_token(of, h200, devices=8)
  whole = roofline.step_seconds(of, h200, devices=8, running=100, context=10_000)
  assert 100 / rate + 100 * 10_000 * cached == pytest.approx(whole)


def test_the_cache_is_what_the_weights_leave():
  of = roofline.sizes(MODEL)
  room = 2 * 1_000_000 * 0.85 - (976 + 4 * 96) * 2
  assert roofline.cache_tokens(of, ROUND, devices=2) == int(room / of.cache_bytes)


def test_what_cannot_be_is_refused():
  of = roofline.sizes(presets.glm_4_5_air())
  with pytest.raises(ValueError, match="devices: expected enough for 212 GB of weights, got 1"):
    roofline.cache_tokens(of, hardware.load("h200"), devices=1)
  with pytest.raises(ValueError, match="running: expected more than 0, got 0"):
    roofline.step_seconds(of, ROUND, devices=1, running=0)
