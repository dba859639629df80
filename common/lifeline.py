"""A pipe that a service inherits from whoever started it: when the other end is gone, it ends too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


def watch(fd: int, on_end: Callable[[], None]) -> None:
    """Call `on_end` on the running loop once, when the other end of `fd` is closed.

    Args:
        fd: the reading end of a pipe or socket, owned by the caller until the end of the process.
    """
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            ended = os.read(fd, 4096) == b""
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            loop.remove_reader(fd)
            on_end()

    os.set_blocking(fd, False)
    loop.add_reader(fd, read)
