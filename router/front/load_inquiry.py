"""Asks the engine how often each expert was chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.errors import NotReady
from router.messages import AskLoads, Loads

TIMEOUT_S = 30.0
"""The engine answers between two steps: longer than any step."""


class LoadInquiry:
    """Questions of several callers at a time, answered in any order."""

    def __init__(
        self, send: Callable[[object], None], is_loaded: Callable[[], bool], timeout_s: float = TIMEOUT_S
    ) -> None:
        self._send = send
        self._is_loaded = is_loaded
        self._timeout_s = timeout_s
        self._last_id = 0
        self._open: dict[int, asyncio.Future[Loads]] = {}

    async def ask(self) -> Loads:
        """The counts of this moment.

        Raises:
            NotReady: the engine has not loaded, or did not answer.
        """
        if not self._is_loaded():
            raise NotReady("the router's engine has not loaded yet: nothing was counted so far")
        self._last_id += 1
        ask_id = self._last_id
        answer: asyncio.Future[Loads] = asyncio.get_running_loop().create_future()
        self._open[ask_id] = answer
        self._send(AskLoads(ask_id))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError:
            raise NotReady(f"the router's engine did not answer within {self._timeout_s:g} s") from None
        finally:
            del self._open[ask_id]

    def answered(self, message: Loads) -> None:
        """Hand an answer to whoever asked."""
        answer = self._open.get(message.ask_id)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def engine_ended(self) -> None:
        """The engine is gone, and its counts with it."""
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(NotReady("the router's engine ended before it had answered"))
