"""What came over the links of one end of an exchange, in order, for the one thread that takes it."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from common.errors import LinkError
from common.exchange.message_link import MessageLink

ItemT = TypeVar("ItemT")
Opener = Callable[[Tensor | LinkError, int], ItemT | None]
"""Makes an item of (message, received_ns), or None where it has dealt with the message itself. What comes
last over a link is the LinkError that ended it."""

REPLY_SPIN_NS = 50_000
"""How long whoever waits for replies looks for them: some are computed meanwhile, and cost no wake-up."""

MOST_LOOKED_AT = 4
"""To look at so few links costs less than to ask which of them something has come over."""


class Inbox(Generic[ItemT]):
    """Filled by `put`, by a thread for each link that can only be waited for, and by the taker itself."""

    def __init__(self, spin_ns: int = 0) -> None:
        """`spin_ns`: how long a taker looks again and again, giving way to others, before it sleeps."""
        self._spin_ns = spin_ns
        self._items: deque[ItemT] = deque()
        self._looks: dict[MessageLink, Callable[[], bool]] = {}
        self._backlogged: list[MessageLink] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        for end in (self._bell, self._button):
            end.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, self._answer_bell)
        self._taking = threading.Lock()
        self._is_closed = False

    def watch(self, link: MessageLink, open_message: Opener[ItemT]) -> None:
        """Take in what comes over a link, until it fails; messages are opened by the taker or by a thread."""
        if link.readable is None:
            threading.Thread(
                target=self._pump, args=(link, open_message), name="link-receiver", daemon=True
            ).start()
            return
        look = partial(self._look, link, open_message)
        self._selector.register(link.readable, selectors.EVENT_READ, look)
        self._looks[link] = look

    def forget(self, link: MessageLink) -> None:
        """Look at a link no more; before it is closed, since its number may then be given to another."""
        if self._looks.pop(link, None) is not None:
            self._backlogged = [other for other in self._backlogged if other is not link]
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.unregister(link.readable)  # type: ignore[arg-type]

    def put(self, item: ItemT) -> None:
        """Append an item, from any thread."""
        self._items.append(item)
        self._ring()

    def put_back(self, item: ItemT) -> None:
        """Hand back, from the taker, what is not finished: it is the next."""
        self._items.appendleft(item)

    def take(
        self, timeout_s: float | None, is_wanted: Callable[[ItemT], bool] = lambda _: True
    ) -> ItemT | None:
        """Wait for the next that is still wanted; None when the time passed or the inbox was closed."""
        began_ns = time.monotonic_ns()
        until_ns = None if timeout_s is None else began_ns + int(timeout_s * 1e9)
        spin_until_ns = began_ns + (self._spin_ns if self._looks else 0)
        with self._taking:
            while not self._is_closed:
                while self._items:
                    item = self._items.popleft()
                    if is_wanted(item):
                        return item
                now_ns = time.monotonic_ns()
                if now_ns < spin_until_ns:
                    if not self._look_at_links():
                        os.sched_yield()
                    continue
                left_s = None if until_ns is None else max(until_ns - now_ns, 0) / 1e9
                self._watch_backlogs()
                if not self._collect(left_s) and left_s == 0.0:
                    return None
        return None

    def is_empty(self) -> bool:
        """Whether nothing has come; for the taker."""
        self._collect(0.0)
        return not self._items

    def close(self) -> None:
        """Wake the taker, now and from here on."""
        self._is_closed = True
        self._ring()
        with self._taking:
            self._selector.close()
            self._bell.close()
            self._button.close()

    def _look_at_links(self) -> bool:
        """Take in what has come over a link; whether anything did."""
        looks = tuple(self._looks.values())
        if len(looks) > MOST_LOOKED_AT:
            return self._collect(0.0)
        return True in [look() for look in looks]

    def _collect(self, timeout_s: float | None) -> bool:
        """Wait until something happens on a link, and take it in; whether anything did."""
        events = self._selector.select(timeout_s)
        for key, _ in events:
            key.data()
        return bool(events)

    def _watch_backlogs(self) -> None:
        for link in tuple(self._looks):
            if link.is_backlogged and link not in self._backlogged:
                self._backlogged.append(link)
                self._listen(link, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _listen(self, link: MessageLink, events: int) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):  # another thread has just dropped it
            key = self._selector.get_key(link.readable)  # type: ignore[arg-type]
            self._selector.modify(key.fileobj, events, key.data)

    def _look(self, link: MessageLink, open_message: Opener[ItemT]) -> bool:
        message: Tensor | LinkError | None
        try:
            # One at a time: most come alone, and looking for another costs as much as being told of it.
            message = link.receive()
            if message is not None:
                self._append(open_message(message, link.came_ns))
            if link in self._backlogged and not link.is_backlogged:
                self._backlogged.remove(link)
                self._listen(link, selectors.EVENT_READ)
        except LinkError as error:
            self.forget(link)
            self._append(open_message(error, time.monotonic_ns()))
            return True
        return message is not None

    def _append(self, item: ItemT | None) -> None:
        if item is not None:
            self._items.append(item)

    def _pump(self, link: MessageLink, open_message: Opener[ItemT]) -> None:
        """What the thread of a link does that can only be waited for."""
        try:
            while (message := link.receive()) is not None:
                self._put_opened(open_message(message, link.came_ns))
        except LinkError as error:
            self._put_opened(open_message(error, time.monotonic_ns()))

    def _put_opened(self, item: ItemT | None) -> None:
        if item is not None:
            self.put(item)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; or closed
            self._button.send(b"!")

    def _answer_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
