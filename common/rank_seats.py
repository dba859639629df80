"""Which ranks of a rank table a process may have, by where it runs and which device it uses. Pure."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address

from common.errors import ConfigError
from common.rank_table import DeviceRank, RankTable


def seats_of(table: RankTable, hosts: Collection[str], device: int | None) -> tuple[int, ...]:
    """The ranks of a process, lowest device first: one where its device is known, else those of its server.

    Args:
        table: what fixes the ranks.
        hosts: addresses of the process: a server's server_id or container_ip, or a device's device_ip.
        device: the number of its device on its server; None where nobody knows.

    Raises:
        ConfigError: the table has no rank for it.
    """
    own = {_normal(host) for host in hosts}
    found = [rank for rank in table.ranks if rank.address in own]
    # An address of one device says more than one of its server, which all of its devices share.
    found = found or [
        rank for rank in table.ranks if own & {_normal(rank.server), _normal(rank.container_ip)}
    ]
    shown = " and ".join(sorted(own))
    if not found:
        raise ConfigError(
            f"the rank table has no server with the address {shown}, its servers are "
            f"{', '.join(table.servers)}: start it on one of them, or add it to the table"
        )
    named = [rank for rank in found if device in (None, rank.device)]
    if not named:
        devices = ", ".join(str(rank.device) for rank in _by_device(found))
        raise ConfigError(
            f"the rank table has no device {device} at {shown}, but {devices}: correct ExpertMesh.deviceId "
            "or the table"
        )
    return tuple(rank.rank for rank in _by_device(named))


def server_at(table: RankTable, hosts: Collection[str]) -> str | None:
    """The server_id of the server that has one of these addresses; None where the table has none."""
    own = {_normal(host) for host in hosts}
    for rank in table.ranks:
        if own & {rank.address, _normal(rank.server), _normal(rank.container_ip)}:
            return rank.server
    return None


def _by_device(ranks: list[DeviceRank]) -> list[DeviceRank]:
    return sorted(ranks, key=lambda rank: rank.device)


def _normal(host: str) -> str:
    """An address in its one spelling; a name as it is."""
    try:
        return str(ip_address(host))
    except ValueError:
        return host
