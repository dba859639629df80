"""Applies the two-server rule at start: finds out what the verdict depends on, and no more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from common.errors import ConfigError
from common.topology import DeviceLink, Member, ProbeResult, Verdict, judge, pairs_that_talk

Pairs = tuple[tuple[Member, Member], ...]


async def check_topology(
    ep_level: int,
    topology: str,
    members: Sequence[Member],
    ask_devices: Callable[[], Awaitable[Collection[DeviceLink]]],
    probe_pairs: Callable[[Pairs], Awaitable[Collection[ProbeResult]]],
    *,
    is_mesh: bool,
) -> str:
    """Let a fleet start, and say why it may.

    Args:
        topology: ExpertMesh.topology.
        members: routers and expert workers; their devices where they are NPUs.
        ask_devices: runs common.lldp.device_links on every server; called at most once.
        probe_pairs: runs common.link_probe.probe at the source of each pair; called at most once.
        is_mesh: whether all members are in one group, or each worker is linked with routers only.

    Raises:
        ConfigError: the reason, the pair that cannot talk, and the way out.
    """
    judgement = judge(ep_level, topology, members, is_mesh=is_mesh)
    links: Collection[DeviceLink] = ()
    if judgement.verdict is Verdict.ASK_DEVICES:
        links = await ask_devices()
        judgement = judge(ep_level, topology, members, links, is_mesh=is_mesh)
    if judgement.verdict is Verdict.PROBE:
        probes = await probe_pairs(pairs_that_talk(members, is_mesh=is_mesh))
        judgement = judge(ep_level, topology, members, links, probes, is_mesh=is_mesh)
    if judgement.verdict is Verdict.REFUSE:
        raise ConfigError(judgement.reason)
    return judgement.reason
