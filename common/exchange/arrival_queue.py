"""What was received and not computed yet, from all routers, in order of arrival."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

ArrivalT = TypeVar("ArrivalT")


class ArrivalQueue(Generic[ArrivalT]):
    """Filled by receive threads, emptied by the computing thread."""

    def __init__(self) -> None:
        self._items: SimpleQueue[ArrivalT | None] = SimpleQueue()
        self._unfinished: deque[ArrivalT] = deque()
        self._is_closed = False

    def put(self, arrival: ArrivalT) -> None:
        """Append what arrived."""
        self._items.put(arrival)

    def put_back(self, arrival: ArrivalT) -> None:
        """Hand back, from the computing thread, what needs another pass: it is the next."""
        self._unfinished.append(arrival)

    def take(self, timeout_s: float | None, is_wanted: Callable[[ArrivalT], bool]) -> ArrivalT | None:
        """Wait for the next that is still wanted; None when the time passed or the queue was closed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_closed:
            if self._unfinished:
                arrival: ArrivalT | None = self._unfinished.popleft()
            else:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                try:
                    arrival = self._items.get(timeout=left)
                except Empty:
                    return None
            if arrival is None or is_wanted(arrival):
                return arrival
        return None

    def close(self) -> None:
        """Wake the thread in `take`, now and from here on."""
        self._is_closed = True
        self._items.put(None)
