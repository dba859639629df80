"""The agent's link to its executor: what it is doing, and epochs it is asked to prepare. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

from common.channel import Shutdown
from common.errors import ControlError
from common.kept_child import KeptChild, Kind
from common.progress_counter import ProgressCounter
from expert_worker.messages import (
    TO_AGENT,
    Check,
    Checked,
    Configure,
    Forget,
    LinkClosed,
    Linked,
    Loaded,
    Loading,
    Prepare,
    PrepareFailed,
    Ready,
    Refused,
)

logger = logging.getLogger(__name__)

EXECUTOR_MODULE = "expert_worker.executor"
STARTING, IDLE, LOADING, READY, STOPPED, DEAD = "starting", "idle", "loading", "ready", "stopped", "dead"
GRACE_S = 3.0
# Incarnations travel as signed 64-bit words in the headers of the links.
INCARNATION_BITS = 62

PrepareAnswer = Loading | Loaded | Linked | Refused | PrepareFailed


class ExecutorLink:
    """Owns the executor. Each start of it is an incarnation.

    Attributes:
        incarnation: the number of this start.
        ready: what the executor said of itself; None while it starts.
        has_started: set while there is an executor that is ready.
        is_new: set by every executor that is ready; whoever makes it known takes that back.
        loaded_bytes: bytes of weights in its memory.
        grouped_matmul: how it runs the experts of a layer, and why; empty before it has loaded.
    """

    def __init__(self, configure: Configure, module: str = EXECUTOR_MODULE) -> None:
        self.incarnation = 0
        self.ready: Ready | None = None
        self.has_started = asyncio.Event()
        self.is_new = asyncio.Event()
        self.loaded_bytes = 0
        self.grouped_matmul = ""
        self._configure = configure
        self._activity = STARTING
        self._progress = ProgressCounter.create()
        self._answers: asyncio.Queue[PrepareAnswer | ControlError] | None = None
        self._checks: dict[int, asyncio.Future[str]] = {}
        self._last_check = 0
        kind = Kind("the executor", module, TO_AGENT, Ready)
        self._kept = KeptChild(kind, self._begin, self._take, self._ended, self._progress)

    @property
    def state(self) -> str:
        """What the executor is doing: one of the constants above."""
        child = self._kept.child
        if child is None or not child.is_running:
            return DEAD
        return STOPPED if child.is_stopped else self._activity

    @property
    def progress(self) -> int:
        """Grows whenever the executor receives rows or finishes an expert."""
        return self._progress.count

    @property
    def cpu_time_ns(self) -> int:
        """Processor time the executor has used."""
        child = self._kept.child
        return child.cpu_time_ns if child is not None else 0

    async def run(self) -> None:
        """Keep an executor running until `stop`.

        Raises:
            ExpertMeshError: the first executor could not start.
        """
        await self._kept.run()

    async def stop(self) -> None:
        """End the executor."""
        await self._kept.stop(Shutdown(), GRACE_S)

    async def restart(self, timeout_s: float) -> int:
        """Kill the executor and wait for the next one; return its incarnation.

        Raises:
            ControlError: the next one did not get ready in time.
        """
        self.has_started.clear()
        self._kept.kill()
        try:
            async with asyncio.timeout(timeout_s):
                await self.has_started.wait()
        except TimeoutError:
            raise ControlError(f"the next executor was not ready within {timeout_s:.0f} s") from None
        return self.incarnation

    async def prepare(self, message: Prepare) -> AsyncIterator[PrepareAnswer]:
        """Ask for an epoch and follow it; ends after Linked, Refused or PrepareFailed.

        Raises:
            ControlError: the executor ended, or a later epoch was asked for.
        """
        if self._answers is not None:
            self._answers.put_nowait(ControlError(f"epoch {message.epoch} was asked for meanwhile"))
        answers = self._answers = asyncio.Queue()
        self._activity = LOADING
        self._kept.send(message)
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, ControlError):
                    raise answer
                if (answer.term, answer.epoch) == (message.term, message.epoch):
                    yield answer
                    if isinstance(answer, Linked | Refused | PrepareFailed):
                        return
        finally:
            if self._answers is answers:
                self._answers = None

    async def check(self, term: int, buffer_bytes: int, ep_level: int) -> str:
        """Ask whether an epoch with these needs would be refused; why, empty where it would not.

        Raises:
            ControlError: there is no executor that could say, or it ended.
        """
        if self.ready is None:
            raise ControlError("the executor is being started: try again")
        self._last_check += 1
        number, answer = self._last_check, asyncio.get_running_loop().create_future()
        self._checks[number] = answer
        self._kept.send(Check(number, term, buffer_bytes, ep_level))
        try:
            refusal: str = await answer
        finally:
            del self._checks[number]
        return refusal

    def forget(self, term: int) -> None:
        """A router is gone."""
        self._kept.send(Forget(term))

    def _begin(self) -> Configure:
        self.incarnation = secrets.randbits(INCARNATION_BITS) | 1
        self.ready, self.loaded_bytes, self._activity = None, 0, STARTING
        return self._configure

    def _take(self, message: Any) -> None:
        match message:
            case Ready():
                self.ready, self._activity = message, IDLE
                self.has_started.set()
                self.is_new.set()
            case LinkClosed():
                logger.info(
                    "the link of term %d, epoch %d ended: %s", message.term, message.epoch, message.reason
                )
            case Loading() | Loaded():
                self.loaded_bytes = message.loaded_bytes
                if isinstance(message, Loaded):
                    self.grouped_matmul = message.grouped_matmul
                self._answer(message)
            case Linked():
                self._activity = READY
                self._answer(message)
            case Refused() | PrepareFailed():
                self._activity = IDLE
                self._answer(message)
            case Checked():
                answer = self._checks.get(message.check_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.refusal)

    def _answer(self, message: PrepareAnswer) -> None:
        if self._answers is not None:
            self._answers.put_nowait(message)

    def _ended(self, why: str) -> None:
        self.has_started.clear()
        self.ready, self.loaded_bytes = None, 0
        if self._answers is not None:
            self._answers.put_nowait(ControlError(why))
        for check in self._checks.values():
            if not check.done():
                check.set_exception(ControlError(why))
