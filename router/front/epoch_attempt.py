"""One epoch on its way: PrepareEpoch on all members, Connect to the engine when all have loaded, Linked."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.config import Config
from common.errors import ControlError
from common.placement import Placement
from protos import fleet_pb2 as pb
from router.front.agent_link import AgentLink
from router.front.epoch_plan import Seating
from router.front.fleet import SERVING, Worker
from router.front.preparation import Preparation
from router.messages import Connect, Disconnect, Linked, LinkFailed, Loaded

WORKER_LINK_TIMEOUT_S = 120.0
"""How long a worker that has loaded waits for the others."""
ENGINE_LINK_TIMEOUT_S = 20.0
LINK_SLACK_S = 5.0
"""How much longer the links may take than the engine waits for each."""
BESIDE_TIMEOUT_S = 10.0
"""What each part may take where all members serve another epoch: they have all weights already."""


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """What is the same in every epoch of this router.

    Attributes:
        placement: of the whole group.
        buffer_bytes: what a worker needs beside its weights with a configuration.
    """

    term: int
    world_size: int
    model_path: str
    dtype: str
    placement: Placement
    exchange: str
    buffer_bytes: Callable[[Config], int]

    def buffers_of(self, config: Config, ep_size: int) -> int:
        """What a worker of so many needs beside its weights: fewer get more rows each."""
        return self.buffer_bytes(config.model_copy(update={"moe_ep": ep_size}))


@dataclass(frozen=True, slots=True)
class Reach:
    """How an attempt reaches others.

    Attributes:
        agent_of: the channel to a worker's agent.
        send: to the engine.
        on_change: called whenever a worker has got further.
    """

    agent_of: Callable[[Worker], AgentLink]
    send: Callable[[object], None]
    on_change: Callable[[], None]


class EpochAttempt:
    """An epoch that is being prepared, or is ready to begin. `fail` ends it at any time.

    Attributes:
        epoch: its number.
        seating: who holds what.
        members: by ep_rank.
        config: what they prepare for.
        failure: why it is over; empty while it is not.
        transports: per ep_rank, what carries its rows; known when it is ready.
    """

    def __init__(
        self,
        facts: EpochFacts,
        epoch: int,
        seating: Seating,
        members: list[Worker],
        config: Config,
        reach: Reach,
        is_beside: bool,
    ) -> None:
        """Plan it; `is_beside`: another epoch is in force, and the engine holds this one until it is told."""
        self.epoch = epoch
        self.seating = seating
        self.members = members
        self.config = config
        self.failure = ""
        self.transports: list[str] = []
        self._facts = facts
        self._reach = reach
        self._is_beside = is_beside
        self._all_serve = all(worker.state == SERVING for worker in members)
        self._task: asyncio.Task[None] | None = None
        self._linked: asyncio.Future[None] | None = None
        self._has_connected = False

    @property
    def names(self) -> str:
        """Its members, for sentences."""
        return ", ".join(worker.worker_id for worker in self.members)

    async def get_ready(self, loaded: Loaded) -> None:
        """Return when all members and the engine are linked.

        Args:
            loaded: what the engine said of itself.

        Raises:
            ControlError: a member refused, died or was late, or the engine did.
        """
        task = self._task = asyncio.create_task(self._prepare(loaded))
        try:
            await asyncio.wait([task])
            if not self.failure:
                task.result()
            if self.failure:
                raise ControlError(self.failure)
        except BaseException as error:
            self.fail(str(error))
            raise

    def fail(self, reason: str) -> None:
        """Give it up, however far it has got."""
        self.failure = self.failure or reason or "it was given up"
        if self._task is not None:
            self._task.cancel()
        if self._has_connected:
            self._has_connected = False
            self._reach.send(Disconnect(self.epoch, "the epoch was not reached"))

    def linked(self, message: Linked) -> None:
        """The engine has all links of an epoch."""
        if message.epoch == self.epoch and self._linked is not None and not self._linked.done():
            self.transports = list(message.transports)
            self._linked.set_result(None)

    def link_failed(self, message: LinkFailed) -> None:
        """The engine could not make a link of an epoch."""
        if message.epoch != self.epoch or self._linked is None or self._linked.done():
            return
        whose = f"ep_rank {message.ep_rank}"
        if 0 <= message.ep_rank < len(self.members):
            whose = f"expert worker {self.members[message.ep_rank].worker_id} ({whose})"
        self._linked.set_exception(ControlError(f"the link to {whose} could not be made: {message.reason}"))

    async def _prepare(self, loaded: Loaded) -> None:
        prefixes = self._prefixes()
        preparations = [
            Preparation(
                self._reach.agent_of(self.members[ep_rank]),
                self._request(ep_rank, loaded, prefix),
                self._reach.on_change,
                is_shown=self.members[ep_rank].state != SERVING,
            )
            for ep_rank, prefix in enumerate(prefixes)
        ]
        try:
            have_loaded = {_name(one): one.loaded for one in preparations}
            await self._all(have_loaded, "had not prepared", BESIDE_TIMEOUT_S if self._all_serve else None)
            self._linked = asyncio.get_running_loop().create_future()
            self._has_connected = True
            self._reach.send(self._connect(prefixes))
            are_linked = {_name(one): one.linked for one in preparations}
            await self._all(
                {**are_linked, "the router's engine": self._linked},
                "had no link for",
                self._link_timeout_s + LINK_SLACK_S,
            )
        finally:
            self._linked = None
            for preparation in preparations:
                await preparation.cancel()

    async def _all(
        self, waited: Mapping[str, asyncio.Future[None]], what: str, timeout_s: float | None
    ) -> None:
        done, late = await asyncio.wait(
            waited.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        for future in done:
            future.result()
        if late:
            names = ", ".join(name for name, future in waited.items() if future in late)
            raise ControlError(f"{names} {what} epoch {self.epoch} within {timeout_s:g} s")

    @property
    def _link_timeout_s(self) -> float:
        return BESIDE_TIMEOUT_S if self._all_serve else ENGINE_LINK_TIMEOUT_S

    def _request(self, ep_rank: int, loaded: Loaded, prefix: str) -> pb.PrepareEpochRequest:
        facts, placement = self._facts, self.seating.placement
        experts = placement.experts_of(ep_rank)
        return pb.PrepareEpochRequest(
            term=facts.term,
            incarnation=self.members[ep_rank].incarnation,
            epoch=self.epoch,
            ep_rank=ep_rank,
            ep_size=placement.ep_size,
            model_path=facts.model_path,
            dtype=facts.dtype,
            layers=[
                pb.LayerExperts(layer_id=layer_id, expert_ids=owned) for layer_id, owned in experts.items()
            ],
            int8_layers=loaded.int8_layers,
            link=pb.LinkAddress(
                host=loaded.store_host,
                port=loaded.store_port,
                prefix=prefix,
                timeout_s=BESIDE_TIMEOUT_S if self._all_serve else WORKER_LINK_TIMEOUT_S,
                exchange=facts.exchange,
            ),
            buffer_bytes=facts.buffers_of(self.config, placement.ep_size),
            ep_level=self.config.ep_level,
        )

    def _prefixes(self) -> list[str]:
        """Where each member joins: a link of its own, or one group for all."""
        prefixes = [f"{self.epoch}-{secrets.token_hex(16)}" for _ in self.members]
        return prefixes if self._facts.exchange == "links" else prefixes[:1] * len(prefixes)

    def _connect(self, prefixes: list[str]) -> Connect:
        return Connect(
            epoch=self.epoch,
            members=[
                {
                    "ep_rank": ep_rank,
                    "worker": worker.worker_id,
                    "incarnation": worker.incarnation,
                    "prefix": prefix,
                }
                for ep_rank, (worker, prefix) in enumerate(zip(self.members, prefixes, strict=True))
            ],
            layers=[
                [layer_id, *(list(owned) for owned in owners)]
                for layer_id, owners in self.seating.placement.layers.items()
            ],
            timeout_s=self._link_timeout_s,
            waits_for_commit=self._is_beside,
        )


def _name(preparation: Preparation) -> str:
    return f"expert worker {preparation.agent.worker.worker_id}"
