"""Is the rank table right, and are two servers connected as ep_level 2 needs it?"""

from __future__ import annotations

from collections.abc import Sequence

from common.rank_table import RankTable
from common.topology import DeviceLink, Member, Verdict, judge
from expertmesh.doctor.facts.ranks import RankTableFacts
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

TABLE, SERVERS = "rank table", "two servers"
TABLE_REFUSED = "HCCL refuses the table, or waits for ranks that are not there"
REFUSED = "HCCL cannot build its links: EI0006 or ret 9 after HCCL_CONNECT_TIMEOUT"


def judge_rank_table(facts: RankTableFacts, world_size: int) -> Finding:
    """Judge the table itself, and whether this machine is in it."""
    if not facts.file:
        return not_applicable(TABLE, "RANK_TABLE_FILE is not set")
    if facts.table is None:
        return failure(TABLE, facts.error, TABLE_REFUSED, "correct it")
    servers = facts.table.servers
    if facts.own_server is None:
        return warning(
            TABLE,
            f"no address of this machine is a server_id or container_ip of {facts.file}: "
            f"{', '.join(servers)}",
            "this machine does not know which ranks are its own",
            "correct the table, or set HOST_IP to this machine's server_id",
        )
    if len(facts.table.ranks) < world_size:
        return warning(
            TABLE,
            f"{facts.file} has {len(facts.table.ranks)} ranks, and worldSize is {world_size}",
            "workers beyond the table have no device",
            "make worldSize and the table agree",
        )
    return ok(
        TABLE, f"{len(facts.table.ranks)} ranks on {len(servers)} servers; this machine is {facts.own_server}"
    )


def judge_two_servers(
    ep_level: int,
    topology: str,
    table: RankTable | None,
    links: Sequence[DeviceLink],
    *,
    is_mesh: bool,
) -> Finding:
    """Judge whether two servers may run at ep_level 2: they must be connected through a switch.

    Args:
        links: what this machine's devices are connected to; the other server's are not known here.
        is_mesh: whether all members are in one group (ExpertMesh.exchange "collective").
    """
    if ep_level != 2:
        return not_applicable(SERVERS, f"ep_level is {ep_level}, which needs no switch")
    if table is None:
        return not_applicable(SERVERS, "no rank table says on how many servers the fleet is")
    members = [Member(f"rank {one.rank}", one.server, one.rank == 0, one.device) for one in table.ranks]
    judgement = judge(ep_level, topology, members, links, is_mesh=is_mesh)
    if judgement.verdict is Verdict.REFUSE:
        return failure(
            SERVERS, judgement.reason, REFUSED, "set ep_level to 1, or connect them through a switch"
        )
    if judgement.verdict is Verdict.ALLOW:
        return ok(SERVERS, judgement.reason)
    own = "; ".join(dict.fromkeys(f"device {one.device}: {one.reason}" for one in links[:1]))
    return warning(
        SERVERS,
        f"ep_level is 2 on two servers, and {judgement.reason}{f' ({own})' if own else ''}",
        REFUSED,
        "run doctor on both servers; where there is a switch, set ExpertMesh.topology to switch",
    )
