"""A link between two processes of one host: messages lie in shared memory, a Unix socket says that they do.

Each message is one datagram: the segment it lies in, and which of the peer's segments have been read. The
socket is all the synchronisation there is. A message is written before its datagram is sent and read after it
was received, and both are system calls, which order memory on every processor; Python offers nothing else
that does. The socket also carries the segments' descriptors and ends with the process at its other end.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
import time
from collections import deque

from torch import Tensor

from common.errors import LinkError
from common.shared_segments import OwnSegments, PeerSegments

_datagram = struct.Struct("=QQIHH")
"""When it was posted, bytes of the message, its segment (0: there is no message), how many segments were
read, and retired."""
_number = struct.Struct("=I")
MOST_NUMBERS = 256
MOST_DATAGRAM = _datagram.size + 2 * MOST_NUMBERS * _number.size
MOST_UNRETURNED = 8
"""Segments that wait for the next message to go home with; then they go without one."""
CONTROL_BYTES = socket.CMSG_SPACE(_number.size)


class SharedMemoryLink:
    """A MessageLink over a connected pair of SOCK_SEQPACKET sockets."""

    keeps_memory = True

    def __init__(self, connected: socket.socket, transport: str) -> None:
        """Take over the socket. `transport` says why this kind of link was chosen."""
        connected.setblocking(False)
        self.transport = transport
        self.came_ns = 0
        self._socket = connected
        self._own = OwnSegments()
        self._peers = PeerSegments()
        self._read: list[int] = []
        self._retired: list[int] = []
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._most_bytes = 0
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def readable(self) -> socket.socket:
        """The socket."""
        return self._socket

    @property
    def is_backlogged(self) -> bool:
        """Whether the peer is so far behind that the socket takes no more datagrams."""
        return bool(self._outbox)

    def message(self, num_bytes: int) -> Tensor:
        """Shared memory for the next message. Raises LinkError."""
        with self._lock:
            self._check_open()
            return self._own.take(num_bytes)

    def post(self, message: Tensor) -> None:
        """Say that a message is there. Raises LinkError."""
        with self._lock:
            self._check_open()
            segment = self._own.of(message)
            fd, segment.fd = segment.fd, None
            self._outbox.append((self._packed(message.numel(), segment.number), fd))
            self._flush()

    def settle(self, timeout_s: float) -> None:
        """There is nothing to let go of: the peer says what it has read."""

    def expect(self, num_bytes: int) -> None:
        """Take messages of up to num_bytes."""
        self._most_bytes = max(self._most_bytes, num_bytes)

    def receive(self) -> Tensor | None:
        """The next message, or None. Raises LinkError."""
        with self._lock:
            self._check_open()
            self._flush()
            while (datagram := self._next_datagram()) is not None:
                message = self._opened(datagram)
                if message is not None:
                    return message
            return None

    def done(self, message: Tensor) -> None:
        """A message has been read: its memory goes home with the next one."""
        with self._lock:
            number = self._peers.number_of(message)
            if number is None or self._is_closed:
                return
            self._read.append(number)
            if len(self._read) >= MOST_UNRETURNED and not self._outbox:
                self._outbox.append((self._packed(0, 0), None))
                self._flush()

    def close(self) -> None:
        """Let go of the socket and all memory: none of it is used again."""
        with self._lock:
            self._is_closed = True
            for _, fd in self._outbox:
                if fd is not None:
                    os.close(fd)
            self._outbox.clear()
            self._socket.close()
            self._own.close()
            self._peers.close()

    def _packed(self, num_bytes: int, number: int) -> bytes:
        read, self._read = self._read[:MOST_NUMBERS], self._read[MOST_NUMBERS:]
        retired, self._retired = self._retired[:MOST_NUMBERS], self._retired[MOST_NUMBERS:]
        head = _datagram.pack(time.monotonic_ns(), num_bytes, number, len(read), len(retired))
        return head + b"".join(map(_number.pack, (*read, *retired)))

    def _flush(self) -> None:
        while self._outbox:
            datagram, fd = self._outbox[0]
            try:
                if fd is None:
                    self._socket.send(datagram)
                else:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
                    self._socket.sendmsg([datagram], [rights])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkError(f"the link failed: {error.strerror}") from error
            self._outbox.popleft()
            if fd is not None:
                os.close(fd)

    def _next_datagram(self) -> tuple[bytes, int | None] | None:
        """What the socket holds next, with the descriptor that came along."""
        try:
            datagram, control, flags, _ = self._socket.recvmsg(
                MOST_DATAGRAM, CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkError(f"the link failed: {error.strerror}") from error
        fds = _descriptors(control) if control else []
        if not datagram:
            raise LinkError("the link failed: the process at its other end is gone, or has closed it")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
            for fd in fds:
                os.close(fd)
            raise LinkError("a datagram came that is longer than any of this protocol")
        return datagram, fds[0] if fds else None

    def _opened(self, came: tuple[bytes, int | None]) -> Tensor | None:
        """Read a datagram; the message it announces, if it does. Every number is checked before its use."""
        datagram, fd = came
        posted_ns, num_bytes, number, num_read, num_retired = (
            _datagram.unpack_from(datagram) if len(datagram) >= _datagram.size else (0, 0, 0, 0, 0)
        )
        num_words = num_read + num_retired
        wanted = _datagram.size + num_words * _number.size
        if len(datagram) != wanted or (fd is not None and not number):
            if fd is not None:
                os.close(fd)
            raise LinkError(f"a datagram of {len(datagram)} bytes is not of this protocol")
        if fd is not None:
            self._peers.add(number, fd)
        words = [word for (word,) in _number.iter_unpack(datagram[_datagram.size :])]
        for word in words[:num_read]:
            if not self._own.give_back(word):
                self._retired.append(word)
        for word in words[num_read:]:
            self._peers.drop(word)
        if not number:
            return None
        if num_bytes > self._most_bytes:
            raise LinkError(
                f"a message of {num_bytes} bytes came where at most {self._most_bytes} were expected"
            )
        self.came_ns = posted_ns  # by the same clock: both processes are on one host
        return self._peers.message(number, num_bytes)

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("the link is closed: join a new one")


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    return [
        fd
        for level, kind, content in control
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in _number.iter_unpack(content[: len(content) - len(content) % _number.size])
    ]
