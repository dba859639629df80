"""Interfaces, whether addresses and ports can be listened on, and who has those that cannot."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.own_address import own_address

LISTEN = "0A"
"""The state in /proc/net/tcp of a socket that listens."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Whether a service could listen.

    Attributes:
        key: the key of the configuration that has the address.
        host: as configured; `resolved` is what it stands for.
        error: name of the errno, like "EADDRINUSE"; or a sentence; empty: it could.
        owner: who has the port, as far as this user may know: its command line; else empty.
    """

    key: str
    host: str
    resolved: str
    port: int
    error: str = ""
    owner: str = ""


def gather_interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one (Linux)."""
    found = {}
    for _, name in socket.if_nameindex():
        try:
            found[name] = own_address(f"interface:{name}")
        except ConfigError:
            continue
    return found


def try_listening(key: str, host: str, port: int) -> Listening:
    """Listen on an address of the configuration for a moment; port 0 tries the address alone."""
    try:
        resolved = own_address(host)
        family, kind, protocol, _, address = socket.getaddrinfo(
            resolved.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except ConfigError as error:
        return Listening(key, host, host, port, str(error))
    except socket.gaierror:
        return Listening(key, host, resolved, port, "name")
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error))
        owner = owner_of(port) if error.errno == errno.EADDRINUSE else ""
        return Listening(key, host, resolved, port, name, owner)
    return Listening(key, host, resolved, port)


def owner_of(port: int) -> str:
    """The command line of the process that listens on a port; empty where this user cannot know it."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        if sockets.isdisjoint(_open_files(process)):
            continue
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        return f"{' '.join(filter(None, words))} (pid {process.name})"
    return ""


def _open_files(process: Path) -> Iterator[str]:
    try:
        links = list((process / "fd").iterdir())
    except OSError:
        return  # it ended meanwhile, or is another user's
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue  # closed meanwhile


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]
