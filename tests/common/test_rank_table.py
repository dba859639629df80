"""The rank table: MindIE's layout taken as it is, every fault named with file and place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.rank_table import DeviceRank, RankTable, parse_rank_table, read_rank_table


def table(num_servers: int = 2, per_server: int = 2) -> dict[str, Any]:
    """A rank table in the documentation's layout: server s is 10.0.0.s, its device d is 192.168.s.d."""
    servers = [
        {
            "device": [
                {
                    "device_id": str(device),
                    "device_ip": f"192.168.{server}.{device}",
                    "rank_id": str(server * per_server + device),
                }
                for device in range(per_server)
            ],
            "server_id": f"10.0.0.{server}",
            "container_ip": f"172.16.0.{server}",
        }
        for server in range(num_servers)
    ]
    return {
        "server_count": str(num_servers),
        "server_list": servers,
        "status": "completed",
        "version": "1.0",
    }


def written(tmp_path: Path, content: str | bytes, mode: int = 0o640) -> Path:
    file = tmp_path / "ranktable.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    file.chmod(mode)
    return file


def test_a_rank_is_a_device_of_a_server_with_an_address(tmp_path: Path) -> None:
    read = read_rank_table(written(tmp_path, json.dumps(table(2, 16))))
    assert read.ranks[19] == DeviceRank(19, "10.0.0.1", 3, "192.168.1.3", "172.16.0.1")
    assert [rank.rank for rank in read.ranks] == list(range(32))
    assert read.servers == ("10.0.0.0", "10.0.0.1")


def test_ranks_may_stand_in_any_order() -> None:
    document = table()
    document["server_list"].reverse()
    assert parse_rank_table(document) == parse_rank_table(table())
    assert parse_rank_table(document).servers[0] == "10.0.0.0"


def test_keys_of_a_super_node_are_left_alone() -> None:
    document = table()
    document["server_list"][0]["device"][0]["super_device_id"] = "7"
    document["server_list"][0]["host_nic_ip"] = "reserve"
    assert parse_rank_table(document) == parse_rank_table(table())


def test_devices_of_one_server_may_share_an_address_and_ipv6_is_an_address() -> None:
    document = table()
    for device in document["server_list"][1]["device"]:
        device["device_ip"] = "fd00:0::1"
    assert {rank.address for rank in parse_rank_table(document).ranks[2:]} == {"fd00::1"}


def test_the_largest_table_is_taken() -> None:
    assert len(parse_rank_table(table(16, 32)).ranks) == 512


DEVICE = "server_list[1].device[0]"


@pytest.mark.parametrize(
    ("place", "value", "rule"),
    [
        ("status", "initializing", 'must be "completed"'),
        ("status", None, "string"),
        ("version", "1.2", 'must be "1.0"'),
        ("server_count", "3", "the length of server_list, 2"),
        ("server_count", 2, "string"),
        ("server_count", "1", "integer from 2 to 60"),
        ("server_count", "61", "integer from 2 to 60"),
        ("server_count", "two", "integer from 2 to 60"),
        ("server_count", "\u0662", "integer from 2 to 60"),
        ("server_count", "9" * 5000, "integer from 2 to 60"),
        ("server_list", {}, "list of 2 to 60 entries"),
        ("server_list", [], "list of 2 to 60 entries"),
        ("server_list[1]", "10.0.0.1", "object"),
        ("server_list[1].server_id", "", "not empty"),
        ("server_list[1].server_id", "a\nb", "not empty"),
        ("server_list[1].server_id", "10.0.0.0", "server_list[0] has it too"),
        ("server_list[1].container_ip", " ", "not empty"),
        ("server_list[1].container_ip", "172.16.0.0", "server_list[0] has it too"),
        ("server_list[1].device", [], "list of 1 to 32 entries"),
        ("server_list[1].device", [{}] * 33, "list of 1 to 32 entries"),
        ("server_list[1].device", [{}], "as many entries as the first server's, 2"),
        (DEVICE, 5, "object"),
        (f"{DEVICE}.device_id", "64", "integer from 0 to 63"),
        ("server_list[1].device[1].device_id", "0", "another device of this server has it too"),
        (f"{DEVICE}.device_id", "01", "integer from 0 to 63"),
        (f"{DEVICE}.device_id", "-1", "integer from 0 to 63"),
        (f"{DEVICE}.device_ip", "192.168.1.256", "IPv4 or IPv6 address"),
        (f"{DEVICE}.device_ip", "<ip of card 0>", "IPv4 or IPv6 address"),
        (f"{DEVICE}.device_ip", "0.0.0.0", "address of one device"),
        (f"{DEVICE}.device_ip", "224.0.0.1", "address of one device"),
        (f"{DEVICE}.device_ip", "192.168.0.0", "a device of server_list[0] has it too"),
        (f"{DEVICE}.device_ip", 3, "string"),
        (f"{DEVICE}.rank_id", "512", "integer from 0 to 511"),
        (f"{DEVICE}.rank_id", "4", "every rank from 0 to 3 must stand there once"),
        (f"{DEVICE}.rank_id", "0", "every rank from 0 to 3 must stand there once"),
    ],
)
def test_a_fault_is_one_sentence_with_file_place_value_and_rule(
    tmp_path: Path, place: str, value: Any, rule: str
) -> None:
    document = table()
    put(document, place, value)
    file = written(tmp_path, json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        read_rank_table(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {place} is ")
    assert rule in message
    assert "\n" not in message
    assert len(message) < 400


def put(document: dict[str, Any], place: str, value: Any) -> None:
    here: Any = document
    *keys, last = place.replace("[", ".").replace("]", "").split(".")
    for key in keys:
        here = here[int(key)] if key.isdigit() else here[key]
    here[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("owner", "key"),
    [
        ("the file", "status"),
        ("the file", "server_list"),
        ("server_list[0]", "device"),
        ("server_list[0]", "container_ip"),
        ("server_list[0].device[1]", "device_ip"),
    ],
)
def test_a_missing_key_is_named_with_its_owner(owner: str, key: str) -> None:
    document = table()
    here: Any = document
    for step in owner.replace("the file", "").replace("[", ".").replace("]", "").split("."):
        here = here if step == "" else here[int(step)] if step.isdigit() else here[step]
    del here[key]
    with pytest.raises(ConfigError) as caught:
        parse_rank_table(document)
    assert str(caught.value).startswith(f"{owner} is an object")
    assert f"must have the key {key}: add it" in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o750, 0o777])
def test_a_table_that_others_may_read_or_change_is_refused_unless_that_was_asked_for(
    tmp_path: Path, mode: int
) -> None:
    file = written(tmp_path, json.dumps(table()), mode)
    with pytest.raises(ConfigError, match=f"{file} has mode {mode:o}.*chmod 640"):
        read_rank_table(file)
    assert read_rank_table(file, check_mode=False) == parse_rank_table(table())


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    for path, why in (
        (absent, "No such file"),
        (tmp_path, "not an ordinary file"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            read_rank_table(path)
        assert "\0" not in str(caught.value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0", "1", "2", "3", "60", "completed", "1.0", "10.0.0.1", "::1", "fe80::1%x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["server_count", "server_list", "device", "device_id", "rank_id", "status"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A right table in which one to three places hold something else, or nothing."""
    document: Any = table(draw(st.integers(2, 3)), draw(st.integers(1, 3)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(containers(document))
        here = draw(st.sampled_from(places))
        if not here:
            continue
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if draw(st.booleans()):
            here[key] = draw(VALUES | st.sampled_from(places).map(copy.deepcopy))
        else:
            del here[key]
    return document


def containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from containers(entry)


def refused_in_one_sentence_or_right(file: Path) -> None:
    try:
        found = read_rank_table(file)
    except ConfigError as error:
        message = str(error)
    else:
        check_whole(found)
        return
    assert str(file) in message
    assert "\n" not in message


def check_whole(found: RankTable) -> None:
    """What every accepted table fulfils."""
    assert [rank.rank for rank in found.ranks] == list(range(len(found.ranks)))
    devices = {(rank.server, rank.device) for rank in found.ranks}
    assert len(devices) == len(found.ranks)
    owners: dict[str, set[str]] = {}
    for rank in found.ranks:
        owners.setdefault(rank.address, set()).add(rank.server)
    assert {len(servers) for servers in owners.values()} == {1}
    assert 2 <= len(found.servers) <= 60


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=mutated() | VALUES)
def test_any_document_is_taken_whole_or_refused(tmp_path: Path, document: Any) -> None:
    refused_in_one_sentence_or_right(written(tmp_path, json.dumps(document)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60) | st.sampled_from([b"[" * 99_999, b"9" * 5000, b'{"a":1,"a":1}', b"NaN"])
)
def test_any_bytes_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ConfigError, match=r"^[^\n]*\Z"):
        read_rank_table(file)
