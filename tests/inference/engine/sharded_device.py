"""Run in a process of its own with four fake devices: the engine over some of them, whose number is
the argument, against the trainer's forward pass on one."""

import sys

import engine_formula as formula
import numpy as np
from engine_trainer import Trainer

from intellect3.inference.engine.device import Device
from intellect3.inference.engine.programs import Shape
from tests.models import helpers

CONFIG = helpers.small(num_kv_heads=4, vocab_size=96)
SIZES = {"slots": 3, "pages": 16, "page_size": 8, "context_length": 32}


def house():
  return formula.batcher(slots=3, pages=16, page=8, context=32, rows=2, chunk=8, steps=4)


def serve(device):
  rooms, rng = house(), np.random.default_rng(0)
  common = rng.integers(0, CONFIG.vocab_size, 11).tolist()
  sequences = [
    formula.sequence(str(index), common[: 11 - index], 12, temperature=temperature, **more)
    for index, (temperature, more) in enumerate(
      [
        (0.0, {"top_logprobs_num": 2, "logprob_start": 0}),
        (1.0, {"top_logprobs_num": 1}),
        (0.0, {}),
        (1.0, {"top_p": 0.9}),
      ]
    )
  ]
  for sequence in sequences:
    rooms.add(sequence)
  formula.finish(rooms, device.run)
  return sequences


def check_split(device, count):
  """Each device holds its share of the cache and of what the SERVE rules split."""
  cache = device._state.cache
  for leaf in cache:
    assert leaf.sharding.num_devices == count
    shares = [shard.data.shape for shard in leaf.addressable_shards]
    assert shares == [(*leaf.shape[:2], leaf.shape[2] // count, *leaf.shape[3:])] * count
  q = device._params["moe_layers"]["attention"]["q"]["kernel"]
  assert q.addressable_shards[0].data.shape[2] == CONFIG.num_heads // count
  assert device._params["head"].addressable_shards[0].data.shape[1] == 96 // count


def main(count):
  params = helpers.random_params(CONFIG)
  trainer = Trainer(CONFIG, params)
  device = Device(
    CONFIG, params, **SIZES, shape=Shape(steps=4, max_top=2, experts=True), tensor_parallel=count
  )
  device.warm_up(*house().padding())
  served = serve(device)
  check_split(device, count)
  for sequence in served:
    trainer.check(sequence)
  device.release(["kv_cache", "weights"])
  device.resume(["kv_cache", "weights"])
  check_split(device, count)
  assert [who.output_ids for who in serve(device)] == [who.output_ids for who in served]
  print("equal")


if __name__ == "__main__":
  main(int(sys.argv[1]))
