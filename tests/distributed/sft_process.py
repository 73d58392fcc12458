"""One process of a supervised run, which the first one may stop after a step.

python sft_process.py DIRECTORY STOP_AFTER fresh|resume
"""

import os
import sys
import threading

from intellect3 import sft
from intellect3.distributed import cluster, processes
from intellect3.environments.reverse_text import ReverseText
from intellect3.models import presets
from intellect3.pipeline import examples
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rendering.tokenizer_files import write_tokenizer
from intellect3.sharding.mesh import make_mesh
from intellect3.training import optimizer

CONFIG = presets.tiny(
  embed_dim=16, head_dim=8, num_heads=2, num_kv_heads=2, mlp_dim=16, expert_mlp_dim=8
)
STEPS = 5


def run(directory, stop_after, resume):
  stop = threading.Event()

  def report(row):
    if row["step"] >= stop_after:
      stop.set()  # on the process that writes; the others learn of it

  return sft.run(
    run_dir=directory,
    example=examples.from_environments([ReverseText()], ByteRenderer(), seed=1),
    steps=STEPS,
    examples_per_step=16,
    row_length=32,
    micro_rows=4,
    row_counts=(8,),
    optimizer=optimizer.adamw(learning_rate=1e-2),
    model_config=CONFIG,
    head_chunk_size=64,
    mesh=make_mesh(fsdp=2),
    write_tokenizer=write_tokenizer,
    stop=stop,
    resume=resume,
    report=report,
  )()


def main():
  directory, stop_after, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
  found = cluster.detect(os.environ)
  if found is None:
    print(run(directory, stop_after, resume)["steps"])
    return
  with processes.started(found):
    print(run(directory, stop_after, resume)["steps"])


main()
