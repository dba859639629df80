"""What ties a process to whoever started it: when that one is gone, it ends too. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


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


def obey_parent_only() -> None:
    """Called first in a service's child: signals meant for the service are its parent's to answer.

    Ctrl-C on a terminal and a signal to the process group reach the child too; it would die in the middle of
    a step while its parent drains. On Linux the kernel kills it with its parent; everywhere the end of its
    channel ends it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without prctl: the channel remains
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
