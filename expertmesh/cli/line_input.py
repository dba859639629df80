"""Lines of standard input, read without a thread: a signal that ends the command never finds one waiting."""

from __future__ import annotations

import asyncio
import os

READ_BYTES = 65536


class LineInput:
    """The lines of one file descriptor, which is read from here alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unread = b""
        self._has_ended = False

    async def line(self) -> str | None:
        """The next line without its end; None after the last one."""
        while b"\n" not in self._unread and not self._has_ended:
            await self._wait_readable()
            received = os.read(self._fd, READ_BYTES)
            self._unread += received
            self._has_ended = not received
        if not self._unread:
            return None
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")

    async def _wait_readable(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(self._fd, readable.set)
        except PermissionError:
            # A regular file, which can always be read and therefore not be waited for.
            return
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._fd)
