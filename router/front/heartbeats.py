"""Heartbeats: which expert workers are alive, and what is done about one that is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from common.errors import ControlError
from protos import fleet_pb2 as pb
from router.front.agent_link import DEAD, STOPPED, AgentLink
from router.front.epochs import Epochs
from router.front.fleet import LOST, REGISTERED, Fleet, Worker

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
TIMEOUT_S = 1.0
MISSES_TO_LOSE = 3
FAILURES_TO_RESTART = 2
PROGRESS_TIMEOUT_S = 0.1
# A worker that has not been heard of for this long is forgotten.
FORGET_S = 600.0


class Heartbeats:
    """One task and one channel per registered worker."""

    def __init__(
        self,
        fleet: Fleet,
        term: int,
        token: str,
        on_change: Callable[[], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._fleet = fleet
        self._term = term
        self._token = token
        self._on_change = on_change
        self._interval_s = interval_s
        self._links: dict[str, AgentLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.epochs: Epochs | None = None

    def agent_of(self, worker: Worker) -> AgentLink:
        """The channel to a worker's agent."""
        return self._links[worker.worker_id]

    def watch(self, worker: Worker) -> None:
        """Follow a worker that has registered; what was known of an earlier start of it is dropped."""
        self._forget(worker.worker_id)
        self._links[worker.worker_id] = AgentLink(worker, self._term, self._token)
        self._tasks[worker.worker_id] = asyncio.create_task(self._follow(worker))

    def lost_by_engine(self, ep_rank: int, reason: str) -> None:
        """The engine lost a worker in the middle of a step: find out what became of it."""
        worker = self._fleet.by_rank(ep_rank)
        if worker is not None and worker.is_alive:
            # Not a candidate until its agent has answered.
            worker.state = LOST
            self._spawn(self._inquire(worker, reason))

    async def progress_of(self, ep_rank: int) -> int | None:
        """A number that changes when the worker moves; None: out of reach or stopped."""
        worker = self._fleet.by_rank(ep_rank)
        if worker is None or worker.worker_id not in self._links:
            return None
        try:
            answer = await self.agent_of(worker).heartbeat(PROGRESS_TIMEOUT_S)
        except ControlError:
            return None
        if answer.executor_state in (STOPPED, DEAD):
            return None
        return answer.progress + answer.cpu_time_ns // 1_000_000

    async def stop(self) -> None:
        """End all tasks and channels."""
        tasks = [*self._tasks.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _follow(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                answer = await self.agent_of(worker).heartbeat(TIMEOUT_S)
            except ControlError as error:
                worker.missed += 1
                if worker.missed >= MISSES_TO_LOSE and worker.is_alive:
                    self._lose(worker, f"missed {worker.missed} heartbeats; {error}")
                if time.monotonic() - worker.heard_s > FORGET_S:
                    self._fleet.workers.pop(worker.worker_id, None)
                    return
                continue
            self._heard(worker, answer)
            if worker.stopped >= MISSES_TO_LOSE or worker.failures >= FAILURES_TO_RESTART:
                await self._restart(worker, f"its executor is {answer.executor_state}")

    def _heard(self, worker: Worker, answer: pb.HeartbeatResponse) -> None:
        worker.heard_s, worker.missed = time.monotonic(), 0
        worker.loaded_bytes = max(worker.loaded_bytes, answer.loaded_bytes)
        worker.grouped_matmul = answer.grouped_matmul
        is_stopped = answer.executor_state in (STOPPED, DEAD)
        worker.stopped = worker.stopped + 1 if is_stopped else 0
        if not worker.is_alive and not is_stopped:
            self._return(worker)

    async def _inquire(self, worker: Worker, reason: str) -> None:
        try:
            answer = await self.agent_of(worker).heartbeat(TIMEOUT_S)
        except ControlError as error:
            self._lose(worker, f"{reason}; its agent does not answer either: {error}")
            return
        if answer.executor_state in (STOPPED, DEAD):
            await self._restart(worker, f"{reason}; its executor is {answer.executor_state}")
        else:
            self._return(worker)

    def _return(self, worker: Worker) -> None:
        worker.state = REGISTERED
        if self.epochs is not None:
            self.epochs.wake()
        self._on_change()

    def _lose(self, worker: Worker, reason: str) -> None:
        if self.epochs is not None:
            self.epochs.worker_lost(worker, reason)
        self._on_change()

    async def _restart(self, worker: Worker, reason: str) -> None:
        """Take a worker out and have its executor replaced; its agent registers it again."""
        worker.stopped = worker.failures = 0
        self._lose(worker, reason)
        logger.warning("restarting the executor of %s: %s", worker.worker_id, reason)
        try:
            await self.agent_of(worker).restart_executor(reason)
        except ControlError as error:
            # An agent that has replaced its executor already refuses the old incarnation and registers again.
            logger.warning("%s", error)

    def _forget(self, worker_id: str) -> None:
        task = self._tasks.pop(worker_id, None)
        link = self._links.pop(worker_id, None)
        if task is not None:
            task.cancel()
        if link is not None:
            self._spawn(link.close())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
