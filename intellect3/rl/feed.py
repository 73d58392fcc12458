"""How the trainer learns that a step's batch is there, on all of its processes.

The first process asks the orchestrator, and looks at the directory whatever it says; the others are
told by the first, so that none begins a step of which another does not know.
"""

import urllib.error
import urllib.request

from intellect3 import rollout_log, types
from intellect3.distributed.processes import Processes
from intellect3.pipeline import iteration, rollout_source
from intellect3.rl.roles import Shared

_LOOK_SECONDS = 0.1


def wait_for_manifest(shared: Shared, processes: Processes) -> rollout_source.Wait:
  """What waits for the manifest of a step; for `rollout_source.batches`."""

  def first(number: int, stop: iteration.Stop) -> types.Manifest | None:
    while not stop.is_set():
      manifest = rollout_log.read_manifest(shared.log_dir, number)
      if manifest is not None:
        processes.post(f"batch/{number}", True)
        return manifest
      try:
        urllib.request.urlopen(f"{shared.orchestrator_url}/batches/{number}", timeout=10).close()
        stop.wait(0.01)  # a shared file system may show the rename later than the message came
      except (urllib.error.URLError, OSError):
        stop.wait(_LOOK_SECONDS)
    return None

  def other(number: int, stop: iteration.Stop) -> types.Manifest | None:
    if processes.await_post(f"batch/{number}", stop) is None:
      return None
    while not stop.is_set():
      manifest = rollout_log.read_manifest(shared.log_dir, number)
      if manifest is not None:
        return manifest
      stop.wait(_LOOK_SECONDS)
    return None

  return first if processes.is_first else other
