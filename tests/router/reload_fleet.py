"""Expert workers without processes, for the stateful test of reloads: they agree, refuse, are late or die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from common.config import Config
from common.errors import ControlError
from common.placement import contiguous
from protos import fleet_pb2 as pb
from router.front.allowance import Allowance
from router.front.epoch_attempt import EpochFacts, Reach
from router.front.epochs import Epochs
from router.front.fleet import Fleet, Worker
from router.front.recovery import Recovery
from router.front.service_state import ServiceState
from router.front.two_servers import TwoServerRule
from router.messages import Connect, Disconnect, Linked, Loaded

NUM_WORKERS = 2
AGREES, REFUSES, DIES_PREPARING, IS_LATE, DIES_PREPARED = range(5)
BUFFERS_PER_PART = 1000


def needs_of(config: Config) -> tuple[int, int]:
    """What every worker is asked for: ep_level, and bytes that follow from a value the tests change."""
    return config.ep_level, BUFFERS_PER_PART * config.micro_batches


class Agent:
    """Stands where the channel to a worker's agent is; keeps what the worker has prepared, by epoch."""

    def __init__(self, worker: Worker, workers: Workers) -> None:
        self.worker = worker
        self.prepared: dict[int, tuple[int, int]] = {}
        self.is_dead = False
        self._workers = workers

    async def prepare(self, request: pb.PrepareEpochRequest) -> AsyncIterator[pb.PrepareEpochResponse]:
        match self._behaviour:
            case n if n == REFUSES:
                yield pb.PrepareEpochResponse(refused=pb.Refused(reason="no"))
                return
            case n if n == DIES_PREPARING:
                self.die()
            case n if n == IS_LATE:
                await asyncio.sleep(30)
        self._check()
        self.prepared[request.epoch] = request.ep_level, request.buffer_bytes
        yield pb.PrepareEpochResponse(loaded=pb.Loaded(loaded_bytes=1))
        yield pb.PrepareEpochResponse(linked=pb.Linked())
        if self._behaviour == DIES_PREPARED:
            # While the history is being written.
            asyncio.get_running_loop().call_soon(self.die)

    async def check_epoch(self, ep_level: int, buffer_bytes: int, timeout_s: float) -> str:
        self._check()
        return "no" if self._behaviour == REFUSES else ""

    def die(self) -> None:
        self.is_dead = True

    @property
    def _behaviour(self) -> int:
        """What steers concerns the last worker alone: one is enough."""
        is_last = self.worker.worker_id == f"w{NUM_WORKERS - 1}"
        return self._workers.behaviour if is_last else AGREES

    def _check(self) -> None:
        if self.is_dead:
            raise ControlError(f"expert worker {self.worker.worker_id} is gone")


class Workers:
    """The fleet's side of a front, with real epochs; the engine's links are two numbers."""

    def __init__(self, config: Callable[[], Config], send: Callable[[object], None]) -> None:
        self.behaviour = AGREES
        self.fleet = Fleet()
        recovery = Recovery(lambda: 120.0, lambda error: None)
        self.state = ServiceState(needs_epoch=True, recovery=recovery, num_streams=lambda: 0)
        self.agents: dict[str, Agent] = {}
        agent_of: Any = lambda worker: self.agents[worker.worker_id]  # noqa: E731 - an edge, of another type
        facts = EpochFacts(
            1, NUM_WORKERS, "m", "float32", contiguous(4, NUM_WORKERS, [1]), "links", lambda c: needs_of(c)[1]
        )
        rule = TwoServerRule("127.0.0.1", "127.0.0.1", None, agent_of)
        reach = Reach(agent_of, send, self.state.announce)
        self.epochs = Epochs(facts, config, self.fleet, self.state, reach, Allowance(config, rule))
        self._incarnation = 0
        for number in range(NUM_WORKERS):
            self.register(f"w{number}")

    def register(self, name: str) -> None:
        self._incarnation += 1
        earlier = self.fleet.workers.get(name)
        worker, _ = self.fleet.register(
            pb.RegisterRequest(worker_id=name, incarnation=self._incarnation, address="127.0.0.1:1")
        )
        self.agents[name] = Agent(worker, self)
        if earlier is not None and self.epochs.is_member(earlier):
            self.epochs.worker_lost(earlier, "it started anew")
        self.epochs.wake()

    def revive(self) -> None:
        """Workers that died come back, as their agents bring them."""
        self.behaviour = AGREES
        for name, agent in list(self.agents.items()):
            if agent.is_dead:
                self.register(name)

    async def serving(self) -> None:
        """Run until an epoch is in force that all who live are in."""
        self.revive()
        work = asyncio.create_task(self.epochs.run())
        try:
            async with asyncio.timeout(20):
                while not self.state.is_linked:
                    await asyncio.sleep(0.001)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


class Links:
    """What the engine has joined: an epoch it takes its steps in, and one that it holds."""

    def __init__(self) -> None:
        self.epoch = self.held = 0

    def take(self, message: object) -> Linked | None:
        """What the engine answers to what concerns its links."""
        match message:
            case Connect():
                if message.waits_for_commit:
                    self.held = message.epoch
                else:
                    self.epoch, self.held = message.epoch, 0
                return Linked(message.epoch, ["links"] * NUM_WORKERS)
            case Disconnect():
                if message.epoch == self.held:
                    self.held = 0
                elif message.epoch == self.epoch:
                    self.epoch = 0
        return None

    def commit(self, epoch: int) -> None:
        """The next step commits what is held; a front that names another one is wrong."""
        assert epoch == self.held
        self.epoch, self.held = self.held or self.epoch, 0


LOADED = Loaded(1, 1, 1, 1, "127.0.0.1", 1)
