"""The rank table, which of its servers this machine is, and what the cables of its devices lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.lldp import device_links
from common.rank_table import RankTable, read_rank_table
from common.topology import DeviceLink

RANK_TABLE_VARIABLE = "RANK_TABLE_FILE"
CHECK_MODE_VARIABLE = "MINDIE_CHECK_INPUTFILES_PERMISSION"
OWN_ADDRESS_VARIABLES = ("MIES_CONTAINER_IP", "HOST_IP")
LLDP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class RankTableFacts:
    """The rank table of this machine.

    Attributes:
        file: the value of RANK_TABLE_FILE; empty: none is named.
        error: why it cannot be used; else empty.
        table: what it holds; None without one or with an error.
        own_server: which server of it this machine is; None: no address fits.
    """

    file: str = ""
    error: str = ""
    table: RankTable | None = None
    own_server: str | None = None


def gather_ranks(environment: Mapping[str, str], addresses: Collection[str]) -> RankTableFacts:
    """Read the rank table that the environment names; `addresses` are this machine's."""
    file = environment.get(RANK_TABLE_VARIABLE, "")
    if not file:
        return RankTableFacts()
    try:
        table = read_rank_table(Path(file), check_mode=environment.get(CHECK_MODE_VARIABLE) != "0")
    except ConfigError as error:
        return RankTableFacts(file, str(error))
    own = {*addresses, *(environment.get(name, "") for name in OWN_ADDRESS_VARIABLES)}
    server = next((rank.server for rank in table.ranks if {rank.server, rank.container_ip} & own), None)
    return RankTableFacts(file, "", table, server)


def ask_cables(table: RankTable, own_server: str) -> list[DeviceLink]:
    """Ask hccn_tool what this machine's devices of the rank table are connected to."""
    devices = [rank.device for rank in table.ranks if rank.server == own_server]
    return asyncio.run(device_links(own_server, devices, LLDP_TIMEOUT_S))
