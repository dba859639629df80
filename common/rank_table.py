"""The rank table (RANK_TABLE_FILE): which device of which server a rank is, in MindIE's layout.

    {"server_count": "2", "status": "completed", "version": "1.0", "server_list": [
        {"server_id": "10.0.0.1", "container_ip": "10.0.0.1", "device": [
            {"device_id": "0", "device_ip": "192.168.1.10", "rank_id": "0"}, ...]}, ...]}

All values are strings. A device may have a super_device_id; keys that are not named here are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigError
from common.json_file import read_json, shown, shown_path

SERVERS = (2, 60)
DEVICES_PER_SERVER = (1, 32)
DEVICE_IDS = (0, 63)
RANKS = (0, 511)
INTEGER = re.compile(r"(?:0|[1-9][0-9]{0,8})\Z")


@dataclass(frozen=True, slots=True)
class DeviceRank:
    """One rank.

    Attributes:
        server: server_id of its server.
        device: device_id, its number on that server.
        address: device_ip, where the other ranks reach it.
        container_ip: where its server's services are reached.
        super_device: super_device_id, its number in a super-node (Atlas A3); empty elsewhere.
    """

    rank: int
    server: str
    device: int
    address: str
    container_ip: str
    super_device: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class RankTable:
    """The ranks by number, 0 first."""

    ranks: tuple[DeviceRank, ...]

    @property
    def servers(self) -> tuple[str, ...]:
        """The servers, in the order of their first ranks; the first one is the master."""
        return tuple(dict.fromkeys(rank.server for rank in self.ranks))

    @property
    def is_super_node(self) -> bool:
        """Whether the table numbers its devices in a super-node: they are Atlas A3 then."""
        return any(rank.super_device for rank in self.ranks)


def read_rank_table(path: Path, *, check_mode: bool = True) -> RankTable:
    """Read and check a rank table.

    Args:
        path: the value of RANK_TABLE_FILE.
        check_mode: refuse a file with more rights than 640, as MindIE does unless
            MINDIE_CHECK_INPUTFILES_PERMISSION is 0.

    Raises:
        ConfigError: one sentence with the file, the place in it, the value found, and the rule.
    """
    document = read_json(path, is_private=check_mode)
    try:
        return parse_rank_table(document)
    except ConfigError as error:
        raise ConfigError(f"{shown_path(path)}: {error}") from None


def parse_rank_table(document: object) -> RankTable:
    """Check what a rank table's file holds.

    Raises:
        ConfigError: one sentence with the place, the value found, and the rule.
    """
    table = _Place(document, "")
    for key, only in (("status", "completed"), ("version", "1.0")):
        if (place := table.entry(key)).text() != only:
            place.refuse(f'must be "{only}"', "wait until the table is complete, or write it anew")
    count, servers = table.entry("server_count"), table.entry("server_list").entries(SERVERS)
    if count.number(SERVERS) != len(servers):
        count.refuse(f"must be the length of server_list, {len(servers)}", "make the two agree")
    devices = [server.entry("device").entries(DEVICES_PER_SERVER) for server in servers]
    for server, own in zip(servers, devices, strict=True):
        if len(own) != len(devices[0]):
            server.entry("device").refuse(
                f"must have as many entries as the first server's, {len(devices[0])}",
                "use equally many devices of every server",
            )
    _check_names(servers)
    _check_devices(devices)
    ranks = [_rank_of(server, device) for server, own in zip(servers, devices, strict=True) for device in own]
    return RankTable(tuple(sorted(ranks, key=lambda rank: rank.rank)))


class _Place:
    """A value of the document and the path to it."""

    def __init__(self, value: object, path: str) -> None:
        self._value = value
        self._path = path

    def refuse(self, rule: str, way_out: str) -> NoReturn:
        raise ConfigError(f"{self._path or 'the file'} is {shown(self._value)}, but {rule}: {way_out}")

    def entry(self, key: str) -> _Place:
        if not isinstance(self._value, dict):
            self.refuse("must be an object", "write it as the documentation of RANK_TABLE_FILE shows")
        if key not in self._value:
            self.refuse(f"must have the key {key}", "add it")
        return _Place(self._value[key], f"{self._path}.{key}" if self._path else key)

    def entries(self, bounds: tuple[int, int]) -> list[_Place]:
        low, high = bounds
        if not isinstance(self._value, list) or not low <= len(self._value) <= high:
            self.refuse(
                f"must be a list of {low} to {high} entries", "list what takes part, and nothing else"
            )
        return [_Place(entry, f"{self._path}[{index}]") for index, entry in enumerate(self._value)]

    def text(self) -> str:
        if not isinstance(self._value, str) or not self._value.strip() or not self._value.isprintable():
            self.refuse("must be a string that is not empty", "write a value in quotation marks")
        return self._value

    def optional_text(self, key: str) -> str:
        """The text at a key of an object; empty without the key."""
        return self.entry(key).text() if isinstance(self._value, dict) and key in self._value else ""

    def number(self, bounds: tuple[int, int]) -> int:
        low, high = bounds
        text = self.text()
        if not INTEGER.match(text) or not low <= int(text) <= high:
            self.refuse(f"must be an integer from {low} to {high}", 'write it in quotation marks, like "2"')
        return int(text)

    def address(self) -> str:
        text = self.text()
        try:
            address = ip_address(text)
        except ValueError:
            self.refuse("must be an IPv4 or IPv6 address", "ask hccn_tool -i <device> -ip -g for it")
        if address.is_unspecified or address.is_multicast:
            self.refuse("must be the address of one device", "ask hccn_tool -i <device> -ip -g for it")
        return str(address)


def _check_names(servers: list[_Place]) -> None:
    for key in ("server_id", "container_ip"):
        seen: dict[str, int] = {}
        for index, server in enumerate(servers):
            name = server.entry(key).text()
            if name in seen:
                server.entry(key).refuse(f"server_list[{seen[name]}] has it too", "give every server its own")
            seen[name] = index


def _check_devices(devices: list[list[_Place]]) -> None:
    total = sum(len(own) for own in devices)
    ranks: set[int] = set()
    server_of: dict[str, int] = {}
    for index, own in enumerate(devices):
        ids: set[int] = set()
        for device in own:
            rank, device_id = device.entry("rank_id"), device.entry("device_id")
            address = device.entry("device_ip")
            if rank.number(RANKS) >= total or rank.number(RANKS) in ranks:
                rank.refuse(f"every rank from 0 to {total - 1} must stand there once", "number them anew")
            if device_id.number(DEVICE_IDS) in ids:
                device_id.refuse("another device of this server has it too", "name every device once")
            # Where ranks share a network card they share its address; two servers never do.
            if server_of.setdefault(address.address(), index) != index:
                address.refuse(
                    f"a device of server_list[{server_of[address.address()]}] has it too",
                    "ask hccn_tool -i <device> -ip -g for it",
                )
            ranks.add(rank.number(RANKS))
            ids.add(device_id.number(DEVICE_IDS))


def _rank_of(server: _Place, device: _Place) -> DeviceRank:
    return DeviceRank(
        rank=device.entry("rank_id").number(RANKS),
        server=server.entry("server_id").text(),
        device=device.entry("device_id").number(DEVICE_IDS),
        address=device.entry("device_ip").address(),
        container_ip=server.entry("container_ip").text(),
        super_device=device.optional_text("super_device_id"),
    )
