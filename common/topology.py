"""The two-server rule: at ep_level 2, two servers must be connected through a switch. Pure.

Cables without a switch join card i of one server with card i of the other only, and AllToAll needs all pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import permutations

SERVERS_IN_QUESTION = 2
ALL_TO_ALL = 2
LEVEL_1 = "set ep_level to 1"
LEVEL_1_ON_LINKS = f"{LEVEL_1} and every ExpertMesh.dataAddress to one that the router reaches"
"""A router has to reach each of its workers at both levels, where they are linked in pairs."""


class Link(Enum):
    """What the cable of a device leads to."""

    SWITCH = "a switch"
    DIRECT = "another NPU"
    UNKNOWN = "something unknown"


class Verdict(Enum):
    """What a start-up does next."""

    ALLOW = "go on"
    REFUSE = "do not start"
    ASK_DEVICES = "find out what each device is connected to, and ask again"
    PROBE = "try the pairs that talk, and ask again"


@dataclass(frozen=True, slots=True)
class Member:
    """The router or an expert worker, as a party on the data plane.

    Attributes:
        name: as people know it, for example "ep_rank 3".
        server: the same for all members on one machine, and only for them.
        device: its NPU's number on that server; None where there is no NPU.
    """

    name: str
    server: str
    is_router: bool = False
    device: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """What a device's neighbour says it is. `reason` is part of a sentence for people."""

    server: str
    device: int
    link: Link
    reason: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether `source` reached `target`; `failure` says why not, and is empty where it did."""

    source: Member
    target: Member
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and one sentence that gives its reason."""

    verdict: Verdict
    reason: str


def pairs_that_talk(members: Sequence[Member], *, is_mesh: bool) -> tuple[tuple[Member, Member], ...]:
    """The pairs on different servers that exchange rows, in both directions.

    Args:
        members: routers and expert workers.
        is_mesh: whether all are in one group (HCCL, NCCL), or each worker is linked with routers only (Gloo).
    """
    return tuple(
        (source, target)
        for source, target in permutations(members, 2)
        if source.server != target.server and (is_mesh or source.is_router != target.is_router)
    )


def judge(
    ep_level: int,
    topology: str,
    members: Sequence[Member],
    links: Collection[DeviceLink] | None = None,
    probes: Collection[ProbeResult] | None = None,
    *,
    is_mesh: bool,
) -> Judgement:
    """Say whether this fleet may start, or what has to be found out first.

    Args:
        topology: ExpertMesh.topology: "auto" looks, "switch" and "direct" are believed.
        links: what is known of the members' devices; None before anybody looked.
        probes: how the pairs that talk fared; None before anybody tried.
        is_mesh: as in pairs_that_talk.
    """
    servers = sorted({member.server for member in members})
    if ep_level != ALL_TO_ALL:
        return Judgement(Verdict.ALLOW, f"ep_level is {ep_level}, which needs no switch")
    if len(servers) != SERVERS_IN_QUESTION:
        return Judgement(Verdict.ALLOW, f"the fleet is on {len(servers)} servers, and the rule is about two")
    if topology == "switch":
        return Judgement(Verdict.ALLOW, "ExpertMesh.topology says that there is a switch")
    if topology == "direct":
        return _refusal(servers, "ExpertMesh.topology says that they are connected directly", LEVEL_1)
    if links is None:
        return Judgement(Verdict.ASK_DEVICES, "nobody has looked yet what the devices are connected to")
    return _judge_links(members, servers, links) or _judge_probes(members, servers, probes, is_mesh)


def _judge_links(
    members: Sequence[Member], servers: Sequence[str], links: Collection[DeviceLink]
) -> Judgement | None:
    known = {(one.server, one.device): one for one in links}
    found = [known.get((member.server, member.device)) for member in members if member.device is not None]
    for one in found:
        if one is not None and one.link is Link.DIRECT:
            return _refusal(
                servers,
                f"device {one.device} of {one.server} is connected to another NPU: {one.reason}",
                LEVEL_1,
            )
    if len(found) == len(members) and all(one is not None and one.link is Link.SWITCH for one in found):
        return Judgement(Verdict.ALLOW, "every device is connected to a switch")
    return None


def _judge_probes(
    members: Sequence[Member],
    servers: Sequence[str],
    probes: Collection[ProbeResult] | None,
    is_mesh: bool,
) -> Judgement:
    if probes is None:
        return Judgement(Verdict.PROBE, "what the devices are connected to is not known")
    pairs = pairs_that_talk(members, is_mesh=is_mesh)
    failures = dict.fromkeys(pairs, "nobody tried")
    failures.update({(one.source, one.target): one.failure for one in probes})
    failed = [pair for pair in pairs if failures[pair]]
    if not failed:
        return Judgement(
            Verdict.ALLOW, f"all {len(pairs)} pairs of ranks on different servers reach each other"
        )
    source, target = failed[0]
    others = f", nor do {len(failed) - 1} other pairs of {len(pairs)}" if len(failed) > 1 else ""
    return _refusal(
        servers,
        f"{source.name} on {source.server} does not reach {target.name} on {target.server} "
        f"({failures[source, target]}){others}",
        LEVEL_1 if is_mesh else LEVEL_1_ON_LINKS,
    )


def _refusal(servers: Sequence[str], reason: str, otherwise: str) -> Judgement:
    first, second = servers
    return Judgement(
        Verdict.REFUSE,
        f"ep_level is 2 on the two servers {first} and {second}, which needs a switch between them, but "
        f"{reason}; connect them through a switch, or {otherwise}",
    )
