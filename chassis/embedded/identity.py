"""Who the processes run as: PostgreSQL refuses root, and initdb wants a user with a name."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chassis.embedded.faults import EmbeddedPostgresError
from chassis.embedded.processes import binary, finish, spawn


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the server's processes are; `child.py` reads `text`."""

    text: str
    uid: int
    gid: int


def choose_identity(directory: Path, data: Path) -> Identity:
    """The first identity that PostgreSQL accepts and that can reach its files.

    Root becomes an unnamed self in a user namespace where those are allowed (files stay root's),
    else an unprivileged user that owns the data: whoever owns it already, or the directories
    around it, or `nobody`. `data` need not be there yet. Raises EmbeddedPostgresError.
    """
    refusals = []
    for identity in _candidates(directory, data):
        paths = (binary("postgres"), directory)
        status, said = finish(spawn(identity.text, [], subprocess.PIPE, paths))
        if status == 0:
            return identity
        refusals.append(f"{identity.text}: {said.removeprefix('tollgate: ')}")
    raise EmbeddedPostgresError(
        "PostgreSQL does not run as root, and no other user can run it here "
        f"({'; '.join(refusals)}): use a data directory that the user `nobody` can reach, such as "
        "one in /var/lib, or allow user namespaces, or start as an ordinary user"
        if os.geteuid() == 0
        else f"PostgreSQL cannot run here ({'; '.join(refusals)}): use a data directory of your own"
    )


def _candidates(directory: Path, data: Path) -> Iterator[Identity]:
    uid, gid = os.geteuid(), os.getegid()
    is_new = not data.exists()
    named = _named_user()
    if uid != 0:
        if not is_new or _has_name(uid):
            yield Identity("plain", uid, gid)
        else:
            yield Identity(f"namespace:{named.pw_uid}", uid, gid)
        return
    places = [directory, *directory.parents] if is_new else [data]
    owners = [place.stat().st_uid for place in places]
    if owners[0] == 0:
        yield Identity(f"namespace:{named.pw_uid}", uid, gid)
    if is_new or owners[0] == 0:
        owners.append(named.pw_uid)
    for owner in dict.fromkeys(owners):
        if owner != 0 and (_has_name(owner) or not is_new):
            group = pwd.getpwuid(owner).pw_gid if _has_name(owner) else owner
            yield Identity(f"setuid:{owner}:{group}", owner, group)


def _has_name(uid: int) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwuid(uid).pw_name)
    return False


def _named_user() -> pwd.struct_passwd:
    """An unprivileged user that has a name: `nobody`, or whichever comes first."""
    users = [user for user in pwd.getpwall() if user.pw_uid != 0]
    if not users:
        raise EmbeddedPostgresError(
            "PostgreSQL needs an unprivileged user with a name and /etc/passwd has none: add one"
        )
    return min(users, key=lambda user: user.pw_name != "nobody")


def adopt(tree: Path, identity: Identity) -> None:
    """Give an existing tree of another user's to the one that will run it."""
    if tree.exists() and tree.stat().st_uid != identity.uid:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, identity.uid, identity.gid, follow_symlinks=False)


def own(path: Path, identity: Identity) -> None:
    """Give it what we have just made."""
    if identity.uid != os.geteuid():
        os.chown(path, identity.uid, identity.gid)
