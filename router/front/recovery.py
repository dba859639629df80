"""From a loss until steps settle again: answers wait meanwhile, and end where that takes too long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from common.errors import StreamLost

logger = logging.getLogger(__name__)

WORKER_LOST, ENGINE_LOST = "WORKER_LOST", "ENGINE_LOST"


class Recovery:
    """Knows whether answers wait, for what and since when. Owned by the event loop.

    It is over when a step has settled, not when the next epoch begins: a step that loses its worker every
    time must not keep the answers waiting forever.

    Attributes:
        why: what was lost last, one sentence; empty while nothing is waited for.
        num_recoveries: how many have succeeded.
        last_s: how long the last one took, from the loss to the first step that settled.
    """

    def __init__(self, timeout_s: Callable[[], float], end_answers: Callable[[StreamLost], None]) -> None:
        """Wait at most `timeout_s` as it is in force, then `end_answers`."""
        self.why = ""
        self.num_recoveries = 0
        self.last_s = 0.0
        self._timeout_s = timeout_s
        self._end_answers = end_answers
        self._reason = ""
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def is_waiting(self) -> bool:
        """Whether answers wait."""
        return self._timer is not None

    @property
    def is_engine_lost(self) -> bool:
        """Whether it was the engine that was lost last, and with it all that it had computed."""
        return self._reason == ENGINE_LOST

    def begin(self, why: str, reason: str) -> None:
        """Something was lost. A loss while answers wait for the end of another does not give them more time.

        Args:
            why: one sentence.
            reason: WORKER_LOST or ENGINE_LOST.
        """
        if self._is_closed:
            return
        if not self.is_waiting:
            self._since_s = time.monotonic()
        self.why, self._reason = why, reason
        self._wait()

    def explain(self, why: str) -> None:
        """Say more exactly what was lost last."""
        if self.is_waiting:
            self.why = why

    def settled(self) -> None:
        """A step has settled since, or there is none to compute."""
        if not self.is_waiting:
            return
        self._end()
        self.num_recoveries += 1
        self.last_s = time.monotonic() - self._since_s
        logger.info("recovered after %.3f s", self.last_s)

    def timeout_changed(self) -> None:
        """Another timeout is in force."""
        if self.is_waiting:
            self._wait()

    def close(self) -> None:
        """Wait for nothing from now on: what ends is ended on purpose."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self.why = None, ""

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left_s = max(self._since_s + self._timeout_s() - time.monotonic(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(left_s, self._give_up)

    def _give_up(self) -> None:
        waited_s = time.monotonic() - self._since_s
        error = StreamLost(
            f"{self.why}; no step was computed within {waited_s:.1f} s of the loss "
            f"(ExpertMesh.recoveryTimeoutSeconds is {self._timeout_s():g}): try again when the fleet serves",
            self._reason,
        )
        self._end()
        logger.error("answers end: %s", error)
        self._end_answers(error)
