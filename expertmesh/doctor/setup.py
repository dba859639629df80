"""What is examined: a configuration, as services would read it, and the environment they would start in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from common.config import Config
from common.errors import ConfigError
from common.own_address import own_address

LOCAL_NAMES = ("localhost", "ip6-localhost")


@dataclass(frozen=True, slots=True)
class Setup:
    """One machine's part of a fleet.

    Attributes:
        config: None where it cannot be read; `problems` says why, one sentence for each bad value.
        source: where the configuration is from, for people.
        device: what shall compute, also where the configuration cannot be read.
        model: the directory of the checkpoint; None: nobody named one.
        router: HOST:PORT of the fleet port this machine's workers register at; None on the router's machine.
        environment: the variables the services would inherit.
    """

    config: Config | None
    source: str
    problems: tuple[str, ...]
    device: str
    model: Path | None
    router: str | None
    environment: Mapping[str, str]

    @property
    def is_worker(self) -> bool:
        """Whether this machine is to run expert workers of a router that runs elsewhere, or beside them."""
        return self.router is not None

    @property
    def link_address(self) -> str:
        """Where the data plane listens; loopback where that is not known."""
        try:
            return own_address(self.config.data_address) if self.config is not None else "127.0.0.1"
        except ConfigError:
            return "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine only. A name that must be resolved does not count."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT as its two parts; IPv6 without its brackets.

    Raises:
        ConfigError: there is no port.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f'"{address}" is no address of a service: write HOST:PORT')
    return host.strip("[]"), int(port)
