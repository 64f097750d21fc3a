"""Tie our life to the parent's, then become the command: run by path, alone.

    python -I -S child.py PARENT_PID COMMAND…

The kernel sends SIGTERM when the parent ends, however it ends, so that a daemon drains and goes
even when its supervisor was killed. Only the standard library: `-S` leaves site-packages out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # A parent that ended before this sent nothing.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(command[0], command)  # the supervisor's own command, no shell
