"""Epochs: the one path by which the fleet changes; start-up, a loss and a return all end in the next epoch.

PrepareEpoch on all members, Connect to the engine when all have loaded, Linked: the next step commits it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import ConfigError, ControlError
from common.placement import Placement
from protos import fleet_pb2 as pb
from router.front.agent_link import AgentLink
from router.front.allowance import Allowance
from router.front.epoch_plan import Candidate, missing_sentence, place_workers
from router.front.fleet import LOST, SERVING, Fleet, Worker
from router.front.preparation import Preparation
from router.front.service_state import ServiceState
from router.messages import Connect, Disconnect, Linked, LinkFailed

logger = logging.getLogger(__name__)

WORKER_LINK_TIMEOUT_S = 120.0
"""How long a worker that has loaded waits for the others."""
ENGINE_LINK_TIMEOUT_S = 20.0
FIRST_RETRY_DELAY_S = 0.2
LONGEST_RETRY_DELAY_S = 8.0


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """What is the same in every epoch of this router.

    Attributes:
        buffer_bytes: what a worker needs beside its weights, as it is configured now.
    """

    term: int
    world_size: int
    model_path: str
    dtype: str
    placement: Placement
    exchange: str
    buffer_bytes: Callable[[], int]


class Epochs:
    """Prepares the next epoch whenever there is none in force and enough workers are alive."""

    def __init__(
        self,
        facts: EpochFacts,
        fleet: Fleet,
        state: ServiceState,
        agent_of: Callable[[Worker], AgentLink],
        send: Callable[[object], None],
        allowance: Allowance,
    ) -> None:
        self._facts = facts
        self._fleet = fleet
        self._state = state
        self._agent_of = agent_of
        self._send = send
        self._allowance = allowance
        self._last_epoch = 0
        self._wake = asyncio.Event()
        self._attempt: asyncio.Task[None] | None = None
        self._members: list[Worker] = []
        self._linked: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Something changed: look again whether an epoch can be prepared."""
        self._wake.set()

    def is_member(self, worker: Worker) -> bool:
        """Whether this start of this worker is in the epoch that is prepared or in force."""
        return any(member is worker for member in self._members)

    @property
    def members(self) -> list[Worker]:
        """The members of the epoch that is prepared or in force, by ep_rank; none without one."""
        return list(self._members)

    def worker_lost(self, worker: Worker, reason: str) -> None:
        """A worker is gone, or started anew: an epoch with it is over."""
        logger.warning("expert worker %s (ep_rank %d): %s", worker.worker_id, worker.ep_rank, reason)
        worker.state = LOST
        if self.is_member(worker):
            self._give_up(reason, tell_engine=True)
        self.wake()

    def engine_lost_epoch(self, epoch: int, reason: str) -> None:
        """The engine dropped an epoch: one of its links failed."""
        if self._state.is_linked and epoch == self._state.epoch:
            self._give_up(reason, tell_engine=False)
        self.wake()

    def engine_ended(self) -> None:
        """The engine is gone and every link with it."""
        self._give_up("the router's engine ended", tell_engine=False)

    def linked(self, message: Linked) -> None:
        """The engine has all links of an epoch."""
        if self._linked is not None and message.epoch == self._last_epoch and not self._linked.done():
            for worker, transport in zip(self._members, message.transports, strict=False):
                worker.transport = transport
                logger.info("rows of expert worker %s travel by %s", worker.worker_id, transport)
            self._linked.set_result(None)

    def link_failed(self, message: LinkFailed) -> None:
        """The engine could not make a link."""
        if self._linked is not None and message.epoch == self._last_epoch and not self._linked.done():
            self._linked.set_exception(
                ControlError(f"the link to ep_rank {message.ep_rank} could not be made: {message.reason}")
            )

    async def run(self) -> None:
        """Prepare epochs for as long as the router lives.

        Raises:
            ConfigError: the members of the first epoch must not form one.
        """
        delay_s = FIRST_RETRY_DELAY_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            why = await self._go_on()
            if why == "":
                delay_s = FIRST_RETRY_DELAY_S
                continue
            logger.warning("the next epoch was not reached: %s", why)
            self._state.wait_for(f"the next epoch was not reached and is tried again: {why}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_DELAY_S)
            self._wake.set()

    async def _go_on(self) -> str:
        """Prepare an epoch if one is needed and possible; return why it was not reached, or nothing."""
        in_force = tuple(worker.worker_id for worker in self._members) if self._state.is_linked else None
        members = in_force or self._next_members()
        if members is None:
            return ""
        if why := await self._refusal(self._fleet.named(members)):
            return why
        if self._state.is_linked or self._state.loaded is None or members != self._next_members():
            return ""
        return await self._try(members)

    async def _refusal(self, members: list[Worker]) -> str:
        """Why these must not form an epoch, or go on with one; asked before anybody loads anything for it."""
        try:
            await self._allowance.check(members)
        except ControlError as error:
            return str(error)
        except ConfigError as error:
            if self._state.is_linked:
                self._give_up(str(error), tell_engine=True)
            elif self._state.epoch == 0 and self._fleet.has(members):
                raise
            return str(error)
        return ""

    def _next_members(self) -> tuple[str, ...] | None:
        """The members of the next epoch, where one is possible now."""
        alive = [worker for worker in self._fleet.workers.values() if worker.is_alive]
        candidates = [Candidate(worker.worker_id, worker.order, worker.seats) for worker in alive]
        size = self._facts.world_size
        places = place_workers(candidates, self._fleet.ranks, size)
        if len(places) < size:
            self._state.wait_for(missing_sentence(places, size, self._fleet.table))
            return None
        return tuple(places[rank] for rank in range(size))

    async def _try(self, members: tuple[str, ...]) -> str:
        """Prepare one epoch; return why it was not reached, or nothing."""
        self._members = self._fleet.assign(members)
        self._last_epoch += 1
        attempt = self._attempt = asyncio.create_task(self._prepare(self._last_epoch, self._members))
        try:
            await asyncio.wait([attempt])
        finally:
            attempt.cancel()
            self._attempt = None
        if attempt.cancelled():
            self._members = []
            return "a member or the engine was lost meanwhile"
        if error := attempt.exception():
            self._members = []
            if not isinstance(error, ControlError):
                logger.error("preparing epoch %d failed", self._last_epoch, exc_info=error)
            return str(error)
        return ""

    async def _prepare(self, epoch: int, members: list[Worker]) -> None:
        loaded = self._state.loaded
        if loaded is None:
            raise ControlError("the router's engine has not loaded")
        names = ", ".join(worker.worker_id for worker in members)
        self._state.wait_for(f"epoch {epoch} is being prepared on {names}")
        prefixes = self._prefixes(epoch, len(members))
        preparations = [
            Preparation(
                self._agent_of(worker),
                self._request(
                    epoch,
                    worker,
                    loaded.int8_layers,
                    pb.LinkAddress(
                        host=loaded.store_host,
                        port=loaded.store_port,
                        prefix=prefix,
                        timeout_s=WORKER_LINK_TIMEOUT_S,
                        exchange=self._facts.exchange,
                    ),
                ),
                self._state.announce,
            )
            for worker, prefix in zip(members, prefixes, strict=True)
        ]
        has_connected = False
        try:
            await asyncio.gather(*(preparation.loaded for preparation in preparations))
            self._linked = asyncio.get_running_loop().create_future()
            has_connected = True
            self._send(self._connect(epoch, members, prefixes))
            await self._all_linked(preparations)
        except BaseException:
            if has_connected:
                self._send(Disconnect(epoch, "the epoch was not reached"))
            raise
        finally:
            self._linked = None
            for preparation in preparations:
                await preparation.cancel()
        for worker in members:
            worker.state = SERVING
        self._state.epoch_begun(epoch)
        logger.info("epoch %d is ready: %s", epoch, names)

    async def _all_linked(self, preparations: list[Preparation]) -> None:
        if self._linked is None:
            raise ControlError("no link was asked for")
        try:
            async with asyncio.timeout(ENGINE_LINK_TIMEOUT_S + 5.0):
                await asyncio.gather(self._linked, *(preparation.linked for preparation in preparations))
        except TimeoutError:
            late = [p.agent.worker.worker_id for p in preparations if not p.linked.done()]
            raise ControlError(
                f"links were not up after {ENGINE_LINK_TIMEOUT_S + 5.0} s; not linked: {late or 'the engine'}"
            ) from None

    def _request(
        self, epoch: int, worker: Worker, int8_layers: list[int], link: pb.LinkAddress
    ) -> pb.PrepareEpochRequest:
        experts = self._facts.placement.experts_of(worker.ep_rank)
        return pb.PrepareEpochRequest(
            term=self._facts.term,
            incarnation=worker.incarnation,
            epoch=epoch,
            ep_rank=worker.ep_rank,
            ep_size=self._facts.world_size,
            model_path=self._facts.model_path,
            dtype=self._facts.dtype,
            layers=[
                pb.LayerExperts(layer_id=layer_id, expert_ids=owned) for layer_id, owned in experts.items()
            ],
            int8_layers=int8_layers,
            link=link,
            buffer_bytes=self._facts.buffer_bytes(),
        )

    def _prefixes(self, epoch: int, count: int) -> list[str]:
        """Where each member joins: a link of its own, or one group for all."""
        prefixes = [f"{epoch}-{secrets.token_hex(16)}" for _ in range(count)]
        return prefixes if self._facts.exchange == "links" else prefixes[:1] * count

    def _connect(self, epoch: int, members: list[Worker], prefixes: list[str]) -> Connect:
        return Connect(
            epoch=epoch,
            members=[
                {
                    "ep_rank": worker.ep_rank,
                    "worker": worker.worker_id,
                    "incarnation": worker.incarnation,
                    "prefix": prefix,
                }
                for worker, prefix in zip(members, prefixes, strict=True)
            ],
            layers=[
                [layer_id, *(list(owned) for owned in owners)]
                for layer_id, owners in self._facts.placement.layers.items()
            ],
            timeout_s=ENGINE_LINK_TIMEOUT_S,
        )

    def _give_up(self, reason: str, tell_engine: bool) -> None:
        """End the epoch in force, or the attempt at one."""
        if self._attempt is not None:
            self._attempt.cancel()
        if self._state.is_linked:
            if tell_engine:
                self._send(Disconnect(self._state.epoch, reason))
            self._state.epoch_over(f"epoch {self._state.epoch} is over and the next is not ready: {reason}")
        self._members = []
