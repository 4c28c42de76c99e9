"""What a pool starts in place of a worker, and what then becomes it: `python leash.py PARENT CORES COMMAND...`.

The kernel kills a worker whose pool ends, even by kill -9: no orphan goes on training. The cores (as in '0,1'; '' for
all) are set before the worker has a thread, so that all its threads inherit them and XLA makes as many as there are
cores. A program of its own, and not a function that runs between fork and exec: the pool's process may have threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, cores: str, command: list[str]) -> None:
  if cores:
    os.sched_setaffinity(0, map(int, cores.split(',')))
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() == parent:  # else it ended before the kernel was told
    os.execv(command[0], command)


if __name__ == '__main__':
  main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
