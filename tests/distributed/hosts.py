"""Hosts with an address and a cable each, made of network namespaces, and the services that run on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tests.source import ROOT

INTERFACE = "eth0"
STOP_S = 20.0


@dataclass
class Host:
    """One host. Its name is that of its namespace and of its end of the cable at the switch."""

    name: str
    address: str
    switch: str
    services: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *arguments: str) -> list[str]:
        """Run a module of the project on this host."""
        return ["nsenter", f"--net=/run/netns/{self.name}", sys.executable, "-m", *arguments]

    def run(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a module to its end."""
        return subprocess.run(
            self.command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
        )

    def call(self, *command: str) -> None:
        """Run a program of the system on this host."""
        result = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.name}", *command], capture_output=True, text=True, timeout=20
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"

    def start(self, log: Path, *arguments: str, **environment: str) -> None:
        """Start a service; what it says goes to `log`."""
        sink: IO[bytes]
        with log.open("ab") as sink:
            service = subprocess.Popen(
                self.command(*arguments),
                cwd=ROOT,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )
        self.services.append(service)

    def set_cable(self, *, is_plugged: bool) -> None:
        """Plug the cable in at the switch, or pull it."""
        ip("-n", self.switch, "link", "set", self.name, "up" if is_plugged else "down")

    def stop(self) -> None:
        """End every service of this host."""
        for service in self.services:
            service.terminate()
        for service in self.services:
            try:
                service.wait(STOP_S)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def ip(*arguments: str) -> None:
    """Run `ip` of iproute2."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr}"


@contextmanager
def cabled_hosts(num_cables: int = 1) -> Iterator[list[Host]]:
    """Two hosts and cables between them without a switch: card i of one leads to card i of the other only.

    The address of a host is that of its card 0; of card i, see `card_address`.
    """
    _skip_without_namespaces()
    number = os.getpid() % 100000
    hosts = [Host(f"em{number}h{index}", f"10.78.0.{10 + index}", "") for index in range(2)]
    made: list[str] = []
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            made.append(host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        for card in range(num_cables):
            name = f"eth{card}"
            ends = ("link", "add", name, "netns", hosts[0].name, "type", "veth", "peer", "name", name)
            ip(*ends, "netns", hosts[1].name)
            for host in hosts:
                ip("-n", host.name, "addr", "add", f"{card_address(host, card)}/24", "dev", name)
                ip("-n", host.name, "link", "set", name, "up")
        yield hosts
    finally:
        for host in hosts:
            host.stop()
        for name in made:
            ip("netns", "del", name)


def card_address(host: Host, card: int) -> str:
    """The address of one card of a host: cards with the same number are in one subnet."""
    return host.address.replace("10.78.0.", f"10.78.{card}.")


@contextmanager
def switched_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts on one switch; skips, with the reason, where namespaces may not be made."""
    _skip_without_namespaces()
    number = os.getpid() % 100000
    switch = f"em{number}sw"
    hosts = [Host(f"em{number}h{index}", f"10.77.0.{10 + index}", switch) for index in range(count)]
    made: list[str] = []
    try:
        for name in (switch, *(host.name for host in hosts)):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for host in hosts:
            ends = ("link", "add", INTERFACE, "netns", host.name, "type", "veth", "peer", "name", host.name)
            ip(*ends, "netns", switch)
            ip("-n", switch, "link", "set", host.name, "master", "switch", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.name, "link", "set", INTERFACE, "up")
        yield hosts
    finally:
        for host in hosts:
            host.stop()
        for name in made:
            ip("netns", "del", name)


def _skip_without_namespaces() -> None:
    missing = [name for name in ("ip", "nsenter", "ss") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no hosts of namespaces: {', '.join(missing)} not installed (iproute2, util-linux)")
    probe = f"em{os.getpid()}probe"
    attempts = (
        ("ip", "netns", "add", probe),
        ("nsenter", f"--net=/run/netns/{probe}", "true"),
        ("ip", "-n", probe, "link", "add", "switch", "type", "bridge"),
        ("ip", "-n", probe, "link", "add", INTERFACE, "type", "veth", "peer", "name", "other"),
    )
    try:
        for attempt in attempts:
            result = subprocess.run(attempt, capture_output=True, text=True, timeout=20)
            if result.returncode != 0:
                pytest.skip(f"no hosts of namespaces: {' '.join(attempt)}: {result.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=20)


def listening(host: Host) -> set[tuple[str, int]]:
    """Where the services of a host listen, as `ss` says."""
    result = subprocess.run(
        [
            "nsenter",
            f"--net=/run/netns/{host.name}",
            "ss",
            "--no-header",
            "--listening",
            "--tcp",
            "--numeric",
        ],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr
    places = [line.split()[3].rpartition(":") for line in result.stdout.splitlines()]
    # Sockets of IPv6 write the addresses of IPv4 in their own way.
    return {(address.strip("[]").removeprefix("::ffff:"), int(port)) for address, _, port in places}


def written(directory: Path, model: Path, world_size: int) -> Path:
    """The one configuration file that all hosts share."""
    entry = {"modelWeightPath": str(model), "worldSize": world_size}
    document = {
        "ServerConfig": {"ipAddress": f"interface:{INTERFACE}"},
        "ModelDeployConfig": {"ModelConfig": [entry]},
        "ExpertMesh": {"dataAddress": f"interface:{INTERFACE}", "agentPort": 1029},
    }
    file = directory / "config.json"
    file.write_text(json.dumps(document))
    return file
