"""The two-server rule, decided from findings alone, and what start-up finds out for it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product

import pytest

from common.errors import ConfigError
from common.topology import (
    DeviceLink,
    Judgement,
    Link,
    Member,
    ProbeResult,
    Verdict,
    judge,
    pairs_that_talk,
)
from common.topology_check import Pairs, check_topology

ROUTER = Member("router", "10.0.0.1", is_router=True)
FLEET = (ROUTER, *(Member(f"ep_rank {rank}", f"10.0.0.{1 + rank // 2}") for rank in range(4)))
NPUS = tuple(Member(f"rank {rank}", f"10.0.0.{1 + rank // 2}", device=rank % 2) for rank in range(4))


def links(*kinds: Link) -> list[DeviceLink]:
    """What the NPUs' cables lead to, rank 0 first."""
    return [
        DeviceLink(npu.server, npu.device or 0, kind, "its neighbour says so")
        for npu, kind in zip(NPUS, kinds, strict=False)
    ]


def probed(members: tuple[Member, ...], *unreachable: str, is_mesh: bool = False) -> list[ProbeResult]:
    return [
        ProbeResult(source, target, "no answer" if target.name in unreachable else "")
        for source, target in pairs_that_talk(members, is_mesh=is_mesh)
    ]


def test_level_1_needs_no_switch() -> None:
    assert judge(1, "direct", FLEET, is_mesh=False).verdict is Verdict.ALLOW


@pytest.mark.parametrize("num_servers", [1, 3])
def test_the_rule_is_about_exactly_two_servers(num_servers: int) -> None:
    members = [Member(f"ep_rank {rank}", f"10.0.0.{rank % num_servers}") for rank in range(6)]
    judgement = judge(2, "direct", members, is_mesh=False)
    assert judgement == Judgement(
        Verdict.ALLOW, f"the fleet is on {num_servers} servers, and the rule is about two"
    )


def test_the_router_is_on_a_server_too() -> None:
    members = [ROUTER, Member("ep_rank 0", "10.0.0.9")]
    assert judge(2, "direct", members, is_mesh=False).verdict is Verdict.REFUSE


@pytest.mark.parametrize(("topology", "verdict"), [("switch", Verdict.ALLOW), ("direct", Verdict.REFUSE)])
def test_what_the_operator_says_is_believed_over_every_finding(topology: str, verdict: Verdict) -> None:
    for kind, unreachable in product(Link, ((), ("rank 2",))):
        found = probed(NPUS, *unreachable, is_mesh=True)
        judgement = judge(2, topology, NPUS, links(*[kind] * 4), found, is_mesh=True)
        assert judgement.verdict is verdict
        assert "ExpertMesh.topology says" in judgement.reason


def test_nothing_is_known_before_the_devices_were_asked_and_the_pairs_tried() -> None:
    assert judge(2, "auto", NPUS, is_mesh=True).verdict is Verdict.ASK_DEVICES
    assert judge(2, "auto", NPUS, [], is_mesh=True).verdict is Verdict.PROBE


def test_a_switch_at_every_device_is_enough() -> None:
    judgement = judge(2, "auto", NPUS, links(*[Link.SWITCH] * 4), is_mesh=True)
    assert judgement == Judgement(Verdict.ALLOW, "every device is connected to a switch")


def test_one_direct_cable_is_refused_with_the_pair_and_the_way_out_whatever_the_probe_says() -> None:
    found = links(Link.SWITCH, Link.SWITCH, Link.SWITCH, Link.DIRECT)
    judgement = judge(2, "auto", NPUS, found, probed(NPUS, is_mesh=True), is_mesh=True)
    assert judgement == Judgement(
        Verdict.REFUSE,
        "ep_level is 2 on the two servers 10.0.0.1 and 10.0.0.2, which needs a switch between them, but "
        "device 1 of 10.0.0.2 is connected to another NPU: its neighbour says so; connect them through a "
        "switch, or set ep_level to 1",
    )


def test_a_direct_cable_of_a_device_that_takes_no_part_does_not_matter() -> None:
    found = [*links(*[Link.SWITCH] * 4), DeviceLink("10.0.0.1", 7, Link.DIRECT, "its neighbour says so")]
    assert judge(2, "auto", NPUS, found, is_mesh=True).verdict is Verdict.ALLOW


@pytest.mark.parametrize(
    "found", [links(Link.SWITCH, Link.SWITCH, Link.UNKNOWN, Link.SWITCH), links(Link.SWITCH, Link.SWITCH)]
)
def test_a_device_that_is_not_known_makes_the_pairs_be_tried(found: list[DeviceLink]) -> None:
    assert judge(2, "auto", NPUS, found, is_mesh=True).verdict is Verdict.PROBE
    every_pair = probed(NPUS, is_mesh=True)
    judgement = judge(2, "auto", NPUS, found, every_pair, is_mesh=True)
    assert judgement == Judgement(Verdict.ALLOW, "all 8 pairs of ranks on different servers reach each other")


def test_a_pair_that_fails_is_refused_by_name() -> None:
    judgement = judge(2, "auto", FLEET, [], probed(FLEET, "ep_rank 3"), is_mesh=False)
    assert judgement.verdict is Verdict.REFUSE
    assert "router on 10.0.0.1 does not reach ep_rank 3 on 10.0.0.2 (no answer); connect" in judgement.reason
    assert judgement.reason.endswith(
        "or set ep_level to 1 and every ExpertMesh.dataAddress to one that the router reaches"
    )
    judgement = judge(2, "auto", FLEET, [], probed(FLEET, "ep_rank 3", "ep_rank 2"), is_mesh=False)
    assert "ep_rank 2 on 10.0.0.2 (no answer), nor do 1 other pairs of 4;" in judgement.reason


def test_a_pair_that_nobody_tried_counts_as_failed() -> None:
    judgement = judge(2, "auto", FLEET, [], probed(FLEET)[1:], is_mesh=False)
    assert judgement.verdict is Verdict.REFUSE
    assert "nobody tried" in judgement.reason


def names(pairs: Pairs) -> set[str]:
    return {f"{source.name} > {target.name}" for source, target in pairs}


def test_workers_on_pair_links_talk_with_the_router_only() -> None:
    assert names(pairs_that_talk(FLEET, is_mesh=False)) == {
        "router > ep_rank 2",
        "ep_rank 2 > router",
        "router > ep_rank 3",
        "ep_rank 3 > router",
    }


def test_in_one_group_every_rank_talks_with_every_rank_of_the_other_server() -> None:
    expected = {f"rank {a} > rank {b}" for a, b in product(range(4), range(4)) if a // 2 != b // 2}
    assert names(pairs_that_talk(NPUS, is_mesh=True)) == expected


class Findings:
    """A fleet whose devices and pairs are known; says what it was asked."""

    def __init__(self, devices: Collection[DeviceLink], probes: Collection[ProbeResult]) -> None:
        self.devices = devices
        self.probes = probes
        self.asked: list[str] = []

    async def ask_devices(self) -> Collection[DeviceLink]:
        self.asked.append("devices")
        return self.devices

    async def probe_pairs(self, pairs: Pairs) -> Collection[ProbeResult]:
        self.asked.append(f"{len(pairs)} pairs")
        return self.probes

    async def check(self, ep_level: int, topology: str = "auto") -> str:
        return await check_topology(
            ep_level, topology, NPUS, self.ask_devices, self.probe_pairs, is_mesh=True
        )


@pytest.mark.asyncio
async def test_start_up_finds_out_no_more_than_the_verdict_depends_on() -> None:
    unknown = Findings(links(*[Link.UNKNOWN] * 4), probed(NPUS, is_mesh=True))
    assert "reach each other" in await unknown.check(2)
    assert unknown.asked == ["devices", "8 pairs"]
    switched = Findings(links(*[Link.SWITCH] * 4), ())
    assert await switched.check(2) == "every device is connected to a switch"
    assert switched.asked == ["devices"]
    for ep_level, topology in ((1, "auto"), (2, "switch")):
        ignored = Findings((), ())
        await ignored.check(ep_level, topology)
        assert ignored.asked == []


@pytest.mark.asyncio
async def test_start_up_refuses_with_the_reason_of_the_verdict() -> None:
    with pytest.raises(ConfigError, match=r"device 0 of 10\.0\.0\.1 is connected.*set ep_level to 1"):
        await Findings(links(*[Link.DIRECT] * 4), ()).check(2)
    with pytest.raises(ConfigError, match=r"rank 0 on 10\.0\.0\.1 does not reach rank 2.*set ep_level to 1"):
        await Findings((), probed(NPUS, "rank 2", is_mesh=True)).check(2)
