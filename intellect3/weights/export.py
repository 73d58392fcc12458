"""A model of several processes as a Hugging Face directory: each writes its own files.

Beside `publish`, which writes versions for servers; this is what a supervised run ends with. One
process uses `models.hf.save`, whose files these are, byte for byte.
"""

import os
import pathlib
from typing import Any

from intellect3.distributed.processes import Processes
from intellect3.models.config import ModelConfig
from intellect3.models.hf import companions
from intellect3.models.stored import aside, shards
from intellect3.weights import gather


def export(
  directory: str | os.PathLike[str],
  config: ModelConfig,
  params: Any,
  *,
  processes: Processes,
  source: str | os.PathLike[str] | None = None,
  shard_bytes: int = shards.SHARD_BYTES,
  threads: int = shards.THREADS,
) -> None:
  """Writes a checkpoint directory; all processes call it together.

  Args:
    directory: made if it is not there; a checkpoint in it is replaced.
    config: of the model.
    params: jax.Arrays over the devices of all processes.
    processes: that write it; the first puts it into its place.
    source: the checkpoint directory that the model came from, as for `models.hf.save`.
    shard_bytes: most bytes of a file of more than one tensor.
    threads: files that each process writes at a time.

  Raises:
    ValueError: as `models.hf.save`.
  """
  companions.check(source, "drop")
  own = gather.gather(
    config,
    params,
    params["embedding"].sharding.mesh,
    dtype=None,
    shard_bytes=shard_bytes,
    index=processes.index,
    count=processes.count,
  )

  def fill(room: pathlib.Path) -> None:
    told = pathlib.Path(processes.broadcast("export/directory", str(room)))
    told.mkdir(exist_ok=True)
    part = (processes.index, processes.count)
    shards.write(told, own.tensors, shard_bytes=shard_bytes, threads=threads, part=part)
    processes.barrier("export/written")
    if processes.is_first:
      companions.write_config(room, config, own.dtype, source, 0)
      if source is not None:
        companions.copy_files(source, room)

  if processes.is_first:
    aside.write(directory, fill)
  else:
    fill(pathlib.Path(directory))
  processes.barrier("export/done")
