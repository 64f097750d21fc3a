"""Whether the addresses of a mesh can be listened on, asked before anything is started."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def faults(addresses: Mapping[str, str]) -> list[str]:
    """What is wrong with the address of each room: one line a fault, each with what to do."""
    found = []
    taken: dict[str, str] = {}
    for room, address in addresses.items():
        if address in taken:
            found.append(
                f"{address} is wanted by both {taken[address]} and {room}: "
                f"give one of them another with TOLLGATE_{room.upper()}_ADDRESS"
            )
        elif fault := _fault(room, address):
            found.append(fault)
        taken[address] = room
    return found


def _fault(room: str, address: str) -> str:
    if address.startswith("unix:"):
        return _socket_fault(room, address)
    host, _, port = address.rpartition(":")
    what_to_do = f"set TOLLGATE_{room.upper()}_ADDRESS to another address"
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = _holder(int(port))
            by = f" by {holder}" if holder else ""
            return (
                f"port {port}, which the {room} daemon wants, is in use{by}: stop that, or "
                f"{what_to_do}"
            )
        if error.errno == errno.EACCES:
            return f"port {port}, which the {room} daemon wants, is not ours to use: {what_to_do}"
        return (
            f"{address}, which the {room} daemon wants, is no address of this machine: {what_to_do}"
        )
    return ""


def _socket_fault(room: str, address: str) -> str:
    path = Path(address.removeprefix("unix:"))
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        return (
            f"{path}, which the {room} daemon wants, is in no directory that we may write to: "
            f"set TOLLGATE_{room.upper()}_ADDRESS to another address"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            return (
                f"{path}, which the {room} daemon wants, is in use: stop what listens there, or "
                f"set TOLLGATE_{room.upper()}_ADDRESS to another address"
            )
    return ""


def _holder(port: int) -> str:
    """The program that listens on a port, as `python (pid 4242)`; empty where we may not know."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in map(str.split, lines):
            # Local address, state (0A listens), inode: see proc(5).
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{words[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = {os.readlink(file) for file in (process / "fd").iterdir()}
            if opened & inodes:
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return ""
