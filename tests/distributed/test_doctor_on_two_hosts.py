"""`expertmesh doctor` on one host, about the router of another: what silence and a refusal mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.hosts import Host, ip, switched_hosts

pytestmark = pytest.mark.distributed
FLEET_PORT = 1028


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with switched_hosts(2) as found:
        yield found


def about(subject: str, host: Host, *arguments: str) -> dict[str, str]:
    """What `doctor` on a host finds about a subject: its first failure, or what else there is."""
    result = host.run("expertmesh", "doctor", *arguments, "--json", timeout_s=200)
    findings = [one for one in json.loads(result.stdout)["findings"] if one["subject"] == subject]
    return min(findings, key=lambda one: one["outcome"] != "failure")


def test_a_closed_port_and_a_firewall_are_told_apart(hosts: list[Host], tmp_path: Path) -> None:
    router, worker = hosts
    address = f"{router.address}:{FLEET_PORT}"
    assert "refused the connection" in about("router", worker, "--router", address)["found"]
    # The router's host loses whatever it would answer, as one behind a firewall does.
    ip("-n", router.name, "route", "add", "blackhole", f"{worker.address}/32")
    try:
        found = about("router", worker, "--router", address)["found"]
    finally:
        ip("-n", router.name, "route", "del", "blackhole", f"{worker.address}/32")
    assert found.startswith(f"{address} did not answer after 3.")
    assert "a firewall drops what is sent there" in found


def test_a_worker_that_would_tell_the_router_to_call_127_0_0_1_is_found(hosts: list[Host]) -> None:
    router, worker = hosts
    found = about("addresses", worker, "--router", f"{router.address}:{FLEET_PORT}")
    assert found["found"] == (
        f"the router is at {router.address}, but ExpertMesh.agentAddress is 127.0.0.1, which it cannot reach"
    )
