"""Which ranks a rank table has for a process, by the addresses and the device it says it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.rank_seats import seats_of, server_at
from common.rank_table import RankTable, parse_rank_table
from tests.common.test_rank_table import table


@pytest.fixture
def ranks() -> RankTable:
    """Servers 10.0.0.0 and .1, containers 172.16.0.0 and .1, devices 192.168.s.d, rank 2 s + d."""
    return parse_rank_table(table())


@pytest.mark.parametrize(
    ("hosts", "device", "seats"),
    [
        ({"10.0.0.1"}, None, (2, 3)),
        ({"172.16.0.1"}, None, (2, 3)),
        ({"172.16.0.0", "10.0.0.0"}, 1, (1,)),
        ({"10.0.0.1"}, 0, (2,)),
        ({"192.168.1.1"}, None, (3,)),
        # Its own address says more than its server's.
        ({"10.0.0.1", "192.168.1.1"}, None, (3,)),
        ({"192.168.1.1"}, 1, (3,)),
    ],
)
def test_a_process_is_known_by_its_server_or_by_its_device(
    ranks: RankTable, hosts: set[str], device: int | None, seats: tuple[int, ...]
) -> None:
    assert seats_of(ranks, hosts, device) == seats


def test_seats_are_in_the_order_of_the_devices_whatever_their_ranks() -> None:
    document = table()
    first, second = document["server_list"][1]["device"]
    first["rank_id"], second["rank_id"] = second["rank_id"], first["rank_id"]
    document["server_list"][1]["device"].reverse()
    assert seats_of(parse_rank_table(document), {"10.0.0.1"}, None) == (3, 2)


def test_devices_that_share_an_address_are_all_of_them_meant() -> None:
    document = table()
    for device in document["server_list"][1]["device"]:
        device["device_ip"] = "fd00:0::1"
    assert seats_of(parse_rank_table(document), {"fd00::1"}, None) == (2, 3)
    assert seats_of(parse_rank_table(document), {"fd00:0:0::1"}, 1) == (3,)


@pytest.mark.parametrize(
    ("hosts", "device", "sentence"),
    [
        (
            {"10.0.0.7", "worker"},
            None,
            "the rank table has no server with the address 10.0.0.7 and worker, its servers are 10.0.0.0, "
            "10.0.0.1: start it on one of them, or add it to the table",
        ),
        (
            {"10.0.0.1"},
            7,
            "the rank table has no device 7 at 10.0.0.1, but 0, 1: correct ExpertMesh.deviceId or the table",
        ),
    ],
)
def test_a_process_that_the_table_does_not_know_is_told_what_it_knows(
    ranks: RankTable, hosts: set[str], device: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        seats_of(ranks, hosts, device)
    assert str(caught.value) == sentence


def test_a_server_is_found_by_any_of_its_addresses(ranks: RankTable, tmp_path: Path) -> None:
    assert server_at(ranks, {"172.16.0.1"}) == "10.0.0.1"
    assert server_at(ranks, {"x", "192.168.0.1"}) == "10.0.0.0"
    assert server_at(ranks, {"10.0.0.9"}) is None
