"""Applies the two-server rule to the members of an epoch, before anything is loaded for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address

from common.config import Config
from common.link_probe import Listener, listening, probe
from common.lldp import device_links
from common.rank_seats import server_at
from common.rank_table import RankTable
from common.topology import DeviceLink, Member, ProbeResult
from common.topology_check import Pairs, check_topology
from router.front.agent_link import AgentLink
from router.front.fleet import Worker, host_of

LOOK_TIMEOUT_S = 10.0
"""Of hccn_tool, and of one attempt to reach somebody: a host that is there answers in milliseconds."""
MACHINE = "this machine"
"""All loopback addresses are one server."""


@dataclass(frozen=True, slots=True)
class TwoServerRule:
    """What the router knows of itself, and how it reaches its workers.

    Attributes:
        host: the router's address on the control plane: services with one host there are on one server,
            however many addresses it has on the data plane.
        data_address: the router's.
        table: names the servers and their devices; None without a rank table.
        agent_of: the channel to a worker's agent.
    """

    host: str
    data_address: str
    table: RankTable | None
    agent_of: Callable[[Worker], AgentLink]

    async def check(self, config: Config, workers: Sequence[Worker]) -> str:
        """Let these workers, by ep_rank, form an epoch with this router; say why they may.

        Raises:
            ConfigError: the rule forbids it: the reason, the pair that cannot talk, and the way out.
            ControlError: a worker could not be asked.
            LinkError: the router's own data address is none of this machine.
        """
        router = self._router(config)
        members = {self._member(rank, worker): worker for rank, worker in enumerate(workers)}
        looking = _Looking(router, self.data_address, members, self.agent_of)
        return await check_topology(
            config.ep_level,
            config.topology,
            [router, *members],
            looking.ask_devices,
            looking.probe_pairs,
            is_mesh=config.exchange == "collective",
        )

    def _router(self, config: Config) -> Member:
        server = None if self.table is None else server_at(self.table, {self.host, self.data_address})
        return Member("the router", server or server_of(self.host), is_router=True, device=config.device_id)

    def _member(self, rank: int, worker: Worker) -> Member:
        name = f"expert worker {worker.worker_id} (ep_rank {rank})"
        if self.table is None:
            return Member(name, server_of(host_of(worker.address)), device=worker.device_id)
        seat = self.table.ranks[rank]
        return Member(name, seat.server, device=seat.device)


def server_of(address: str) -> str:
    """The server that a host on the control plane is, where no rank table says it."""
    try:
        return MACHINE if ip_address(address).is_loopback else address
    except ValueError:
        return MACHINE if address == "localhost" else address


@dataclass(frozen=True, slots=True)
class _Looking:
    """Asks the members of one epoch what they see."""

    router: Member
    data_address: str
    workers: dict[Member, Worker]
    agent_of: Callable[[Worker], AgentLink]

    async def ask_devices(self) -> Collection[DeviceLink]:
        """Have every member with a device ask hccn_tool about it."""
        return await asyncio.gather(
            *(
                self._ask_device(member)
                for member in (self.router, *self.workers)
                if member.device is not None
            )
        )

    async def probe_pairs(self, pairs: Pairs) -> Collection[ProbeResult]:
        """Have every target listen, and then every source try to reach all of its targets."""
        async with AsyncExitStack() as stack:
            listeners = {
                target: await stack.enter_async_context(self._listening(target))
                for target in dict.fromkeys(target for _, target in pairs)
            }
            targets: dict[Member, list[Member]] = {}
            for source, target in pairs:
                targets.setdefault(source, []).append(target)
            found = await asyncio.gather(
                *(
                    self._probe(source, own, [listeners[one] for one in own])
                    for source, own in targets.items()
                )
            )
        return [result for results in found for result in results]

    async def _ask_device(self, member: Member) -> DeviceLink:
        device = member.device or 0
        if member is self.router:
            (found,) = await device_links(member.server, [device], LOOK_TIMEOUT_S)
            return found
        link, reason = await self.agent_of(self.workers[member]).device_link(device, LOOK_TIMEOUT_S)
        return DeviceLink(member.server, device, link, reason)

    def _listening(self, member: Member) -> AbstractAsyncContextManager[Listener]:
        if member is self.router:
            return listening(self.data_address)
        return self.agent_of(self.workers[member]).answering_probes()

    async def _probe(
        self, source: Member, targets: list[Member], listeners: list[Listener]
    ) -> list[ProbeResult]:
        if source is self.router:
            failures = await probe(self.data_address, listeners, LOOK_TIMEOUT_S)
        else:
            failures = await self.agent_of(self.workers[source]).probe(listeners, LOOK_TIMEOUT_S)
        return [ProbeResult(source, *pair) for pair in zip(targets, failures, strict=True)]
