"""JSON lines over a socketpair: how a service's parent and its child talk. Torch-free.

Every message is a flat frozen dataclass of JSON values. A line is {"type": CLASS, fields...}; a receiver
knows the classes it accepts, and anything else is an error. Nothing is pickled.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import ControlError

MAX_LINE_BYTES = 64 << 20
"""Longest line accepted: a prompt of four million tokens fits."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Parent to child: end the process."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """Child to parent, the last message before it exits: why it cannot go on.

    Attributes:
        kind: name of the class in common.errors.
    """

    kind: str
    message: str


def encode(message: Any) -> bytes:
    """One message dataclass as one line."""
    fields = {"type": type(message).__name__, **asdict(message)}
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes, accepted: dict[str, type]) -> Any:
    """One line as a message dataclass.

    Raises:
        ControlError: not a JSON object, a type that is not accepted, or fields that do not fit it.
    """
    try:
        fields = json.loads(line)
        return accepted[fields.pop("type")](**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ControlError(f"a line that is no message arrived from the other process: {error!r}") from error


def by_name(*classes: type) -> dict[str, type]:
    """The classes a receiver accepts, by the name they travel under."""
    return {cls.__name__: cls for cls in classes}


class ChildChannel:
    """The child's end: blocking reads from one thread, writes from any."""

    def __init__(self, fd: int, accepted: dict[str, type]) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._accepted = accepted
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Write one message. A parent that is gone raises BrokenPipeError or ConnectionResetError."""
        line = encode(message)
        with self._lock:
            self._socket.sendall(line)

    def __iter__(self) -> Iterator[Any]:
        """Messages until the parent closes its end or dies."""
        with self._socket.makefile("rb", buffering=1 << 16) as lines:
            for line in lines:
                yield decode(line, self._accepted)


class ParentChannel:
    """The parent's end, on an event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, accepted: dict[str, type]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._accepted = accepted

    @classmethod
    async def open(cls, end: socket.socket, accepted: dict[str, type]) -> ParentChannel:
        """Take over `end` of a socketpair."""
        reader, writer = await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES)
        return cls(reader, writer, accepted)

    def send(self, message: Any) -> None:
        """Queue one message. Never blocks; a child that is gone is noticed by the reader."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Messages until the child closes its end or dies."""
        while line := await self._read_line():
            yield decode(line, self._accepted)

    async def _read_line(self) -> bytes:
        try:
            return await self._reader.readline()
        except (ConnectionResetError, BrokenPipeError):
            return b""

    def close(self) -> None:
        """Close the channel; the child sees the end of its input and exits."""
        self._writer.close()
