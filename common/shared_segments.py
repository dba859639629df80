"""Memory that two processes of one host share: made and owned by the sender, mapped by the receiver too.

A segment has no name: it lives in a descriptor that is handed to one peer, and is gone with its last mapping.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import LinkError

LEAST_BYTES = 1 << 16
MOST_FREE_BYTES = 1 << 25
"""Free memory that is kept for the next messages; pages nobody wrote to take none."""
MOST_FRONTS = 128
"""Views of one segment that are kept: the messages of decode steps have few lengths."""


def is_supported() -> bool:
    """Whether this system has memory without a name whose size can be sealed."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


@dataclass(eq=False, slots=True)
class Segment:
    """One piece of shared memory.

    Attributes:
        number: which of its owner's.
        memory: all of it, flat uint8.
        fd: its descriptor while the peer has not been given it.
    """

    number: int
    memory: Tensor
    fd: int | None


class OwnSegments:
    """The segments of one sender. A segment is used for one message at a time."""

    def __init__(self) -> None:
        self._in_use: dict[int, Segment] = {}
        self._by_address: dict[int, Segment] = {}
        self._free: dict[int, list[Segment]] = {}
        self._free_bytes = 0
        self._last_number = 0

    def take(self, num_bytes: int) -> Tensor:
        """Memory of at least num_bytes. Raises LinkError where the system has no more."""
        size = max(1 << max(num_bytes - 1, 0).bit_length(), LEAST_BYTES)
        if fitting := self._free.get(size):
            segment = fitting.pop()  # the last that was used is the likeliest to be in a cache
            self._free_bytes -= size
        else:
            self._last_number += 1
            segment = make_segment(self._last_number, size)
            self._by_address[segment.memory.data_ptr()] = segment
        self._in_use[segment.number] = segment
        return segment.memory

    def of(self, message: Tensor) -> Segment:
        """The segment at whose front a message lies."""
        return self._by_address[message.data_ptr()]

    def give_back(self, number: int) -> bool:
        """The peer has read a message; whether the segment is kept. Raises LinkError."""
        segment = self._in_use.pop(number, None)
        if segment is None:
            raise LinkError(f"the peer gave segment {number} back, which it does not have")
        size = segment.memory.numel()
        if self._free_bytes + size <= MOST_FREE_BYTES:
            self._free.setdefault(size, []).append(segment)
            self._free_bytes += size
            return True
        del self._by_address[segment.memory.data_ptr()]
        return False

    def close(self) -> None:
        """Let go of everything; what the peer still reads stays its own."""
        for segment in self._by_address.values():
            if segment.fd is not None:
                os.close(segment.fd)
                segment.fd = None
        for held in (self._in_use, self._by_address, self._free):
            held.clear()
        self._free_bytes = 0


class PeerSegments:
    """The segments of the peer, as the receiver maps them."""

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._fronts: dict[int, dict[int, Tensor]] = {}
        self._number_at: dict[int, int] = {}

    def add(self, number: int, fd: int) -> None:
        """Map a segment that has come; the descriptor is closed. Raises LinkError."""
        try:
            if number in self._memory:
                raise LinkError(f"the peer sent segment {number} twice")
            self._memory[number] = memory = map_sealed(fd)
            self._fronts[number] = {}
            self._number_at[memory.data_ptr()] = number
        finally:
            os.close(fd)

    def message(self, number: int, num_bytes: int) -> Tensor:
        """The front of a segment. Raises LinkError where it is not that long."""
        memory = self._memory.get(number)
        if memory is None or num_bytes > memory.numel():
            raise LinkError(f"the peer announces {num_bytes} bytes in segment {number}, which do not exist")
        fronts = self._fronts[number]
        if (front := fronts.get(num_bytes)) is None:
            if len(fronts) >= MOST_FRONTS:
                fronts.clear()
            fronts[num_bytes] = front = memory[:num_bytes]
        return front

    def number_of(self, message: Tensor) -> int | None:
        """Which segment a message lies in; None where all have been let go."""
        return self._number_at.get(message.data_ptr())

    def drop(self, number: int) -> None:
        """Unmap what the peer uses no more."""
        memory = self._memory.pop(number, None)
        if memory is not None:
            del self._fronts[number], self._number_at[memory.data_ptr()]

    def close(self) -> None:
        """Unmap everything, as soon as nobody looks at a message in it."""
        self._memory.clear()
        self._fronts.clear()
        self._number_at.clear()


def make_segment(number: int, size: int) -> Segment:
    """Make a segment whose size nobody can change. Raises LinkError."""
    try:
        fd = os.memfd_create("expertmesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            return Segment(number, map_sealed(fd), fd)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise LinkError(f"no {size} bytes of shared memory can be had: {error.strerror}") from error


def map_sealed(fd: int) -> Tensor:
    """Map all of a descriptor. Raises LinkError where its owner could still make it shorter."""
    try:
        # Reading past the end of a file that has been cut kills the process.
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise LinkError("a segment came whose size is not sealed")
        # Python's mmap would keep a descriptor of every segment open. A segment is made by a thread in
        # inference mode, and one outside of it may be the next to write into it.
        size = os.fstat(fd).st_size
        with torch.inference_mode(False):
            return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise LinkError(f"a segment cannot be mapped: {error}") from error


SEALS = (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) if is_supported() else 0
