"""Runs a command that dies with the process that started it (Linux parent-death signal).

    python -m intellect3.leash PARENT_PID COMMAND [ARGUMENT ..]

The process is replaced by the command: same pid, same file descriptors. On other systems the
command runs without the leash. Imports nothing but the standard library, so it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
  parent, command = int(sys.argv[1]), sys.argv[2:]
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the leash was on
      sys.exit(1)
  os.execvp(command[0], command)


if __name__ == "__main__":
  main()
