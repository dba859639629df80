"""How the router joins the workers of an epoch: a link with each, or one group of all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from common import compute_threads
from common.environment import hccl_buffer_mb
from common.errors import LinkError
from common.exchange.collective import CollectiveRouterExchange, join_group
from common.exchange.link_choice import Meeting, join_worker
from common.exchange.links import LinksRouterExchange
from common.exchange.message_link import MessageLink
from common.exchange.routing import RowShape
from common.exchange.slot_tables import SlotTables
from common.npu_limits import ExchangeChoice, ExchangeShape, choose_exchange, generation_of
from common.placement import Placement
from common.preflight_npu import DEFAULT_BUFFER_MB
from common.process_group import StoreServer
from common.timeline import Timeline
from router.messages import Connect

LEAST_WAIT_S = 0.5
"""What the last worker at its address gets, however long the others took."""

EpochExchange = LinksRouterExchange | CollectiveRouterExchange


class MemberMissing(LinkError):
    """A worker did not come to its address."""

    def __init__(self, ep_rank: int, error: LinkError) -> None:
        super().__init__(str(error))
        self.ep_rank = ep_rank


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where links are agreed on. Whoever holds it keeps the store's server alive.

    Attributes:
        data_address: this host's address on the data plane.
        backend: of a group, as torch.distributed calls it: gloo, nccl or hccl.
        same_host: of links, ExpertMesh.sameHostTransport.
    """

    store: StoreServer
    data_address: str
    backend: str
    same_host: str


@dataclass(frozen=True, slots=True)
class RouterEnd:
    """What is the same for every epoch of an engine.

    Attributes:
        term: the router's.
        floor_s: shortest time a worker is given to answer.
        ask_progress: a worker's progress by ep_rank, or None.
        timeline: where the exchange records what it does, or None.
        n_routed_experts: of the checkpoint.
        most_tokens: of a step.
    """

    shape: RowShape
    term: int
    floor_s: float
    ask_progress: Callable[[int], int | None]
    timeline: Timeline | None
    n_routed_experts: int
    most_tokens: int


def join_links(message: Connect, address: LinkAddress, end: RouterEnd) -> LinksRouterExchange:
    """Join every worker by a link of its own.

    Raises:
        MemberMissing: a worker did not come in time.
    """
    deadline = time.monotonic() + message.timeout_s
    links: list[MessageLink] = []
    try:
        for member in message.members:
            link = _join_link(member, address, deadline)
            links.append(link)  # one by one: what was joined before a failure is closed below
    except LinkError as error:
        for link in links:
            link.close()
        raise MemberMissing(len(links), error) from error
    if any(link.keeps_memory for link in links):
        compute_threads.take_cores(0)
    return LinksRouterExchange(
        links,
        _names(message),
        placement_of(message),
        end.shape,
        end.term,
        _incarnations(message),
        end.floor_s,
        end.ask_progress,
        end.timeline,
    )


def join_one_group(message: Connect, address: LinkAddress, end: RouterEnd) -> CollectiveRouterExchange:
    """Join all workers in one group.

    Raises:
        MemberMissing: somebody did not come in time; nobody knows who.
        ConfigError: HCCL_BUFFSIZE is no number.
    """
    placement, choice = placement_of(message), None
    if address.backend == "hccl":
        choice = _choose(placement, end)
    try:
        group = join_group(
            address.store.host,
            address.store.port,
            str(message.members[0]["prefix"]),
            0,
            1 + len(message.members),
            message.timeout_s,
            address.data_address,
            address.backend,
            None if choice is None else choice.windows,
        )
    except LinkError as error:
        raise MemberMissing(-1, error) from error
    if choice is not None:
        if group.windows is None and choice.windows is not None:
            choice = choice.without_windows()
        group = replace(group, transport=f"collective: at ep_level 2 by {choice.text}")
    return CollectiveRouterExchange(
        group,
        _names(message),
        placement,
        end.shape,
        end.term,
        _incarnations(message),
        end.floor_s,
        end.ask_progress,
        end.timeline,
    )


def _choose(placement: Placement, end: RouterEnd) -> ExchangeChoice:
    buffer_mb = hccl_buffer_mb("npu")
    return choose_exchange(
        ExchangeShape(
            generation_of(torch.get_device_module("npu").get_device_name()),
            placement.ep_size,
            end.n_routed_experts,
            end.shape.num_experts_per_tok,
            end.shape.hidden_size,
            end.most_tokens,
            str(end.shape.dtype).removeprefix("torch."),
            SlotTables(placement).most_local,
            DEFAULT_BUFFER_MB if buffer_mb is None else buffer_mb,
        )
    )


JOIN: dict[str, Callable[[Connect, LinkAddress, RouterEnd], EpochExchange]] = {
    "links": join_links,
    "collective": join_one_group,
}


def placement_of(message: Connect) -> Placement:
    """The placement of an epoch, as it came over the channel."""
    layers: dict[int, tuple[tuple[int, ...], ...]] = {}
    for layer_id, *owners in message.layers:
        layers[int(str(layer_id))] = tuple(tuple(owner) for owner in owners if isinstance(owner, list))
    return Placement(layers)


def _join_link(member: dict[str, int | str], address: LinkAddress, deadline: float) -> MessageLink:
    return join_worker(
        Meeting(
            address.store.host,
            address.store.port,
            prefix=str(member["prefix"]),
            timeout_s=max(deadline - time.monotonic(), LEAST_WAIT_S),
            data_address=address.data_address,
            same_host=address.same_host,
        )
    )


def _names(message: Connect) -> list[str]:
    return [str(member["worker"]) for member in message.members]


def _incarnations(message: Connect) -> list[int]:
    return [int(member["incarnation"]) for member in message.members]
