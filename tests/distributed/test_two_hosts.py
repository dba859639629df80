"""A router on one host and workers on others: real addresses, real cables, one answer."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.hosts import Host, listening, switched_hosts, written
from tests.source import ROOT
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
READY_S = 90.0
NOTICED_S = 30.0
ASK = ("expertmesh", "generate", "Far from here", "--temperature", "0", "--ignore-eos", "--max-tokens")


@dataclass
class Fleet:
    """A router, two workers, and a client's host."""

    router: Host
    workers: list[Host]
    client: Host
    log: Path

    @property
    def target(self) -> str:
        """Where clients reach the router."""
        return f"{self.router.address}:1025"

    def answer(self) -> list[int]:
        """Ask from the client's host."""
        result = self.client.run(*ASK, "24", "--json", "--target", self.target)
        assert result.returncode == 0, result.stderr + self.log.read_text()[-4000:]
        return list(json.loads(result.stdout)["token_ids"])

    def serves(self) -> bool:
        """Whether the router is ready, asked from the client's host."""
        return self.client.run("common.health", self.target, "readiness").returncode == 0

    def wait_until(self, claim: Callable[[], bool], deadline_s: float) -> None:
        """Poll until the claim holds."""
        end = time.monotonic() + deadline_s
        while not claim():
            assert time.monotonic() < end, self.log.read_text()[-6000:]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, family="v3", n_routed_experts=24)
    return directory


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet on four hosts that serves."""
    folder = tmp_path_factory.mktemp("fleet")
    config, token = str(written(folder, model, world_size=2)), folder / "token"
    token.write_text("a-secret-of-the-fleet")
    with switched_hosts(4) as (router, first, second, client):
        fleet = Fleet(router, [first, second], client, folder / "log")
        secret = {"EXPERTMESH_FLEET_TOKEN_FILE": str(token)}
        router.start(fleet.log, "router", "--config", config, **secret)
        for index, worker in enumerate(fleet.workers):
            names = ("--router", f"{router.address}:1028", "--worker-id", f"worker-{index}")
            worker.start(fleet.log, "expert_worker", "--config", config, *names, **secret)
        fleet.wait_until(fleet.serves, READY_S)
        yield fleet


@pytest.fixture(scope="module")
def expected(fleet: Fleet, model: Path) -> list[int]:
    """The answer of one process with all experts in it."""
    alone = fleet.client.run(*ASK, "24", "--json", "--model", str(model), "--expert-workers", "0")
    assert alone.returncode == 0, alone.stderr
    return list(json.loads(alone.stdout)["token_ids"])


def test_hosts_stream_the_answer_of_one_process(fleet: Fleet, expected: list[int]) -> None:
    assert len(expected) == 24
    assert fleet.answer() == expected
    # One kernel, so one boot id; but nobody reaches the other's sockets, and nobody shares its memory.
    assert fleet.log.read_text().count("links: the worker is in another network namespace") >= 2


def test_every_port_is_open_at_the_configured_address_and_nowhere_else(fleet: Fleet) -> None:
    for host in (fleet.router, *fleet.workers):
        found = listening(host)
        assert {address for address, _ in found} <= {host.address, "127.0.0.1"}
        assert {port for address, port in found if address == "127.0.0.1"} <= {1026}
    assert {(fleet.router.address, port) for port in (1025, 1028)} < listening(fleet.router)
    for host in fleet.workers:
        assert (host.address, 1029) in listening(host)


def test_an_answer_waits_while_a_cable_is_out_and_goes_on_with_the_same_tokens(
    fleet: Fleet, expected: list[int]
) -> None:
    long = ("400", "--target", fleet.target)
    undisturbed = fleet.client.run(*ASK, *long)
    assert undisturbed.returncode == 0, undisturbed.stderr
    asking = subprocess.Popen(
        fleet.client.command(*ASK, *long),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what is read ahead would be missing below
    )
    assert asking.stdout is not None
    try:
        said = asking.stdout.read(1)
        fleet.workers[1].set_cable(is_plugged=False)
        fleet.wait_until(lambda: not fleet.serves(), NOTICED_S)
        assert asking.poll() is None
        fleet.workers[1].set_cable(is_plugged=True)
        rest, complaint = asking.communicate(timeout=READY_S)
    finally:
        asking.kill()
        asking.wait()
        fleet.workers[1].set_cable(is_plugged=True)
    assert asking.returncode == 0, complaint.decode()
    assert (said + rest).decode() == undisturbed.stdout
    fleet.wait_until(fleet.serves, READY_S)
    assert fleet.answer() == expected
