"""`interface:NAME` is the address of that interface, wherever an address of this host is configured."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psutil
import pytest

from common.config import load_config
from common.errors import ConfigError
from common.grpc_server import start_server
from common.own_address import own_address


def test_every_interface_has_the_address_that_the_kernel_lists_for_it() -> None:
    listed = {
        name: [one.address for one in addresses if one.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    with_address = {name: addresses for name, addresses in listed.items() if addresses and ":" not in name}
    assert "lo" in with_address
    for name, addresses in with_address.items():
        assert own_address(f"interface:{name}") in addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "router", "0.0.0.0"])
def test_any_other_address_stays_as_it_is(address: str) -> None:
    assert own_address(address) == address


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r'"interface:nothere0" stands for .* one of (.*, )?lo\b'):
        own_address("interface:nothere0")


@pytest.mark.asyncio
async def test_a_server_listens_at_the_address_of_the_interface() -> None:
    server = await start_server("interface:lo", 0, lambda _server: None, ())
    await server.stop(0)
    assert server.address == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    "address", ["interface:", "interface:a name", "interface:sixteen-letters-", "interface:a/b"]
)
def test_what_no_interface_can_be_called_is_refused(address: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"ExpertMesh": {"dataAddress": address}}))
    with pytest.raises(ConfigError, match=r"dataAddress is .*, but it must be an address or interface:NAME"):
        load_config(file)
