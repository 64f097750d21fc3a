"""Become a user PostgreSQL accepts, tie our life to the parent's, then exec: run by path, alone.

    python -I -S child.py PARENT_PID IDENTITY [PATH…] [-- COMMAND…]

IDENTITY is `plain` (stay who we are), `namespace:UID` (a user namespace in which our own id is
shown as UID, so files stay owned by us) or `setuid:UID:GID` (drop root for good). Each PATH must
be one that user may enter or execute. Without a COMMAND this is a question: the exit status is
the answer, and the reason is one line on stderr. Only the standard library: `-S` leaves
site-packages out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

REFUSED = 3
_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _become(identity: str) -> None:
    kind, *ids = identity.split(":")
    if kind == "setuid":
        uid, gid = (int(number) for number in ids)
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    elif kind == "namespace":
        uid, gid = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{ids[0]} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{ids[0]} {gid} 1")


def _die_with(parent: int) -> None:
    # After the change of identity, which clears the setting. A parent that died before this
    # call sent nothing: then it is no longer our parent.
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:
        raise OSError("the process that asked for this is gone")


def _reach(paths: list[str]) -> None:
    for path in paths:
        if not os.access(path, os.X_OK):
            raise OSError(f"cannot reach {path}")


def main(arguments: list[str]) -> int:
    """Do as the module says; returns an exit status only when there is nothing to exec."""
    parent, identity, *rest = arguments
    split = rest.index("--") if "--" in rest else len(rest)
    paths, command = rest[:split], rest[split + 1 :]
    try:
        _become(identity)
        _die_with(int(parent))
        _reach(paths)
        os.umask(0o077)
        if command:
            os.execv(command[0], command)
    except OSError as error:
        print(f"tollgate: {error.strerror or error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
