"""compose/router.yaml and compose/expert-worker.yaml, each on a machine of its own, by docs/deploy.md.

A machine is a container that only holds an address; services join its network as they would their host's.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.compose.conftest import IMAGE
from tests.compose.machine import Machine, answer, document, serves, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(600)]
NETWORK = "expertmesh-tests-lan"
HOSTS = ("router", "worker-a", "worker-b", "worker-c")
COPY_ROUTER, START_ROUTER, COPY_WORKER, START_WORKER, SHOW_STATUS = range(5)
LISTEN = "0A"
SERVED_S = 180.0


@dataclass
class Lan:
    """A network of machines, by name."""

    machines: dict[str, Machine]
    addresses: dict[str, str]

    @property
    def router(self) -> str:
        """Where clients reach the router."""
        return f"{self.addresses['router']}:1025"

    def start_worker(self, name: str) -> None:
        """Follow the document on a worker's machine."""
        machine, blocks = self.machines[name], document("Several machines")
        machine.run(blocks[COPY_WORKER])
        machine.change(
            "compose/expert-worker.env",
            EXPERTMESH_ROUTER=f"{self.addresses['router']}:1028",
            EXPERTMESH_DATA_ADDRESS=self.addresses[name],
        )
        machine.run(blocks[START_WORKER])

    def members(self) -> set[str]:
        """The names of the workers of the epoch in force."""
        command = document("Several machines")[SHOW_STATUS].strip() + " --json"
        found = json.loads(self.machines["router"].run(command))["workers"]
        return {worker["worker_id"] for worker in found if worker["state"] == "serving"}

    def listening(self, name: str) -> set[tuple[str, int]]:
        """Where the services on a machine listen, as the kernel says."""
        machine = self.machines[name]
        said = machine.engine.docker("exec", host_of(name), "cat", "/proc/net/tcp", "/proc/net/tcp6")
        rows = [line.split() for line in said.splitlines() if ":" in line]
        return {decoded(row[1]) for row in rows if row[3] == LISTEN}


def decoded(written: str) -> tuple[str, int]:
    """Read an address of /proc/net/tcp, which is written in words of a little-endian machine."""
    address, port = written.split(":")
    words = [address[at : at + 8] for at in range(0, len(address), 8)]
    packed = b"".join(bytes.fromhex(word)[::-1] for word in words)
    found = ipaddress.ip_address(packed)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found), int(port, 16)


def host_of(name: str) -> str:
    return f"expertmesh-tests-{name}"


@pytest.fixture(scope="module")
def lan(built: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """A router and two workers that serve; a third machine has an address and nothing else."""
    engine = built.engine
    token = built.directory / "compose" / "fleet-token"
    folder = tmp_path_factory.mktemp("lan")
    engine.docker("network", "create", NETWORK)
    lan = Lan({}, {})
    try:
        for name in HOSTS:
            lan.addresses[name] = host(built, name)
            machine = Machine(
                folder / name,
                engine,
                built.model,
                IMAGE=IMAGE,
                NETWORK_MODE=f"container:{host_of(name)}",
                COMPOSE_PROJECT_NAME=f"{host_of(name)}-services",
            )
            machine.run(f"install -m 400 -o 1000 -g 1000 '{token}' compose/fleet-token")
            lan.machines[name] = machine
        start_router(lan)
        lan.start_worker("worker-a")
        lan.start_worker("worker-b")
        wait_until(lambda: serves(lan.router), "the fleet serves", SERVED_S)
        yield lan
    finally:
        for name, machine in lan.machines.items():
            role = "router" if name == "router" else "expert-worker"
            machine.run(
                f"docker compose --env-file compose/{role}.env -f compose/{role}.yaml down -t 5 || true"
            )
            machine.run(f"docker rm --force {host_of(name)}")
        engine.docker("network", "rm", NETWORK)


def host(built: Machine, name: str) -> str:
    """Start a machine; return its address."""
    engine = built.engine
    engine.docker(
        *("run", "--detach", "--init", "--name", host_of(name), "--hostname", name, "--network", NETWORK),
        *("--entrypoint", "sleep", IMAGE, "infinity"),
    )
    networks = json.loads(engine.docker("inspect", host_of(name)))[0]["NetworkSettings"]["Networks"]
    return str(networks[NETWORK]["IPAddress"])


def start_router(lan: Lan) -> None:
    """Follow the document on the router's machine."""
    machine, blocks = lan.machines["router"], document("Several machines")
    machine.run(blocks[COPY_ROUTER])
    address = lan.addresses["router"]
    machine.change(
        "compose/router.env",
        EXPERTMESH_DATA_ADDRESS=address,
        EXPERTMESH_IP_ADDRESS=address,
        EXPERTMESH_WORLD_SIZE="2",
    )
    machine.run(blocks[START_ROUTER])


def test_separate_machines_stream_the_answer_of_one_process(lan: Lan, expected: list[int]) -> None:
    assert answer(lan.router) == expected
    assert lan.members() == {"worker-a-1029", "worker-b-1029"}


def test_every_port_is_open_at_the_configured_address_and_nowhere_else(lan: Lan) -> None:
    found = {name: lan.listening(name) for name in ("router", "worker-a", "worker-b")}
    own = {
        name: {port for host, port in pairs if host == lan.addresses[name]} for name, pairs in found.items()
    }
    assert {1025, 1028} < own["router"]
    assert 1029 in own["worker-a"]
    assert 1029 in own["worker-b"]
    elsewhere = {
        (name, host, port)
        for name, pairs in found.items()
        for host, port in pairs
        if host != lan.addresses[name]
    }
    # Docker's own name server listens inside each container, at 127.0.0.11.
    assert {one for one in elsewhere if one[1] != "127.0.0.11"} == {("router", "127.0.0.1", 1026)}


def test_a_machine_that_was_added_takes_over_when_another_is_lost(lan: Lan, expected: list[int]) -> None:
    lan.start_worker("worker-c")
    command = document("Several machines")[SHOW_STATUS].strip() + " --json"
    router = lan.machines["router"]
    wait_until(lambda: len(json.loads(router.run(command))["workers"]) == 3, "the third has registered")
    # The machine's network goes away with it; its worker hears and says nothing more.
    router.engine.docker("kill", host_of("worker-a"))
    wait_until(lambda: lan.members() == {"worker-b-1029", "worker-c-1029"}, "the third has taken over")
    wait_until(lambda: serves(lan.router), "the fleet serves again")
    assert answer(lan.router) == expected
