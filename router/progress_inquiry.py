"""Asks the front, from the middle of a step, whether an overdue expert worker still moves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from router.messages import AskProgress, Progress

ANSWER_TIMEOUT_S = 1.0
"""How long the front may take; an agent on a live host answers it in milliseconds."""


class ProgressInquiry:
    """Questions from the thread that runs the step, answers from the thread that reads the channel."""

    def __init__(self, send: Callable[[object], None], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._ask_ids = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, SimpleQueue[int | None]] = {}

    def ask(self, ep_rank: int) -> int | None:
        """The worker's progress, which differs from the last if it moved; None: out of reach."""
        answer: SimpleQueue[int | None] = SimpleQueue()
        with self._lock:
            ask_id = next(self._ask_ids)
            self._open[ask_id] = answer
        try:
            self._send(AskProgress(ask_id, ep_rank))
            return answer.get(timeout=self._timeout_s)
        except Empty:
            return None
        finally:
            with self._lock:
                del self._open[ask_id]

    def answer(self, message: Progress) -> None:
        """Hand an answer to whoever asked; one that comes too late is dropped."""
        with self._lock:
            waiting = self._open.get(message.ask_id)
        if waiting is not None:
            waiting.put(message.progress)
