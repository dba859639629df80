"""What was received and not computed yet, from all routers, in order of arrival."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from common.exchange import Received


class ReceivedQueue:
    """Filled by receive threads, emptied by the computing thread."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Received | None] = SimpleQueue()
        self._is_closed = False

    def put(self, received: Received) -> None:
        """Append what arrived."""
        self._items.put(received)

    def take(self, timeout_s: float | None, is_wanted: Callable[[Received], bool]) -> Received | None:
        """Wait for the next that is still wanted; None when the time passed or the queue was closed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_closed:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            try:
                received = self._items.get(timeout=left)
            except Empty:
                return None
            if received is None or is_wanted(received):
                return received
        return None

    def close(self) -> None:
        """Wake the thread in `take`, now and from here on."""
        self._is_closed = True
        self._items.put(None)
