"""Addresses, ports and peers: who has what, and what an answer or its absence means."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from common.config import TOKEN_VARIABLE, load_config
from common.grpc_server import start_server
from common.interceptors import FleetTokenInterceptor
from expertmesh.doctor.facts.network import Listening, gather_interfaces, try_listening
from expertmesh.doctor.facts.peer import FLEET_SERVICE, Peer, ask_router, try_connecting
from expertmesh.doctor.finding import Finding, Outcome
from expertmesh.doctor.findings.addresses import judge_addresses
from expertmesh.doctor.findings.peers import judge_peer
from expertmesh.doctor.findings.ports import judge_ports

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says who has a port")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def port_of(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])


def addresses(**hosts: str) -> list[Listening]:
    keys = {
        "client": "ServerConfig.ipAddress",
        "fleet": "ExpertMesh.fleetAddress",
        "agent": "ExpertMesh.agentAddress",
        "data": "ExpertMesh.dataAddress",
    }
    return [Listening(keys[name], host, host, 0) for name, host in hosts.items()]


def judged(found: list[Listening], router: str | None = None, num_servers: int = 1) -> list[Finding]:
    findings = judge_addresses(found, INTERFACES, router=router, num_servers=num_servers)
    return [one for one in findings if one.outcome is not Outcome.OK]


def test_a_fleet_on_one_machine_may_stay_on_loopback() -> None:
    assert judged(addresses(client="127.0.0.1", fleet="127.0.0.1", data="127.0.0.1")) == []
    for own in ("localhost", "127.0.0.1", "10.0.0.1"):
        assert judged(addresses(agent="127.0.0.1", data="127.0.0.1"), router=own) == []


def test_a_fleet_of_several_machines_may_not() -> None:
    [one] = judged(addresses(client="127.0.0.1", fleet="10.0.0.1", data="127.0.0.1"))
    assert one.outcome is Outcome.FAILURE
    assert "workers of other machines register at 10.0.0.1" in one.found
    found = judged(addresses(agent="127.0.0.1", data="127.0.0.1"), router="10.0.0.9")
    assert [finding.outcome for finding in found] == [Outcome.FAILURE] * 2
    assert "the router is at 10.0.0.9" in found[0].found
    [one] = judged(addresses(client="127.0.0.1", fleet="127.0.0.1", data="127.0.0.1"), num_servers=2)
    assert "the rank table has 2 servers" in one.found
    assert judged(addresses(agent="10.0.0.1", data="10.0.0.1"), router="10.0.0.9") == []


def test_an_address_of_another_machine_is_named_with_those_that_are_here() -> None:
    [one] = judged([Listening("ExpertMesh.dataAddress", "10.9.9.9", "10.9.9.9", 0, "EADDRNOTAVAIL")])
    assert one.found == 'ExpertMesh.dataAddress is "10.9.9.9", which is not an address of this machine'
    assert "10.0.0.1 (eth0)" in one.remedy


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.77", "which is not an address of this machine"),
        ("interface:nowhere0", "there is none (No such device)"),
        ("no-such-host.invalid", "a name that cannot be resolved here"),
    ],
)
def test_an_address_is_really_tried(host: str, words: str) -> None:
    [one] = judged([try_listening("ExpertMesh.dataAddress", host, 0)])
    assert one.outcome is Outcome.FAILURE
    assert words in one.found


def test_interfaces_are_found_by_name() -> None:
    assert "127.0.0.1" in gather_interfaces().values()


@needs_proc
def test_who_has_a_port_is_named(listener: socket.socket) -> None:
    found = try_listening("ServerConfig.port", "127.0.0.1", port_of(listener))
    assert found.error == "EADDRINUSE"
    assert f"(pid {os.getpid()})" in found.owner
    [one] = judge_ports([found])
    assert one.outcome is Outcome.FAILURE
    assert "Address already in use" in one.symptom


def test_a_port_that_expertmesh_has_itself_is_a_warning() -> None:
    router = "python -m router --config x (pid 7)"
    [one] = judge_ports(
        [Listening("ServerConfig.port", "127.0.0.1", "127.0.0.1", 1025, "EADDRINUSE", router)]
    )
    assert one.outcome is Outcome.WARNING
    assert "a service of expertmesh runs already" in one.found


def test_two_services_cannot_share_a_port() -> None:
    both = [Listening(f"ServerConfig.{key}", "h", "127.0.0.1", 1025) for key in ("port", "managementPort")]
    [one] = judge_ports(both)
    assert one.found == "ServerConfig.port and ServerConfig.managementPort are both 1025 on 127.0.0.1"


def test_a_port_for_root_alone_is_a_failure() -> None:
    [one] = judge_ports([Listening("ServerConfig.port", "127.0.0.1", "127.0.0.1", 80, "EACCES")])
    assert (one.outcome, "Permission denied" in one.symptom) == (Outcome.FAILURE, True)


def test_without_ports_there_is_nothing_to_look_at() -> None:
    assert [one.outcome for one in judge_ports([])] == [Outcome.NOT_APPLICABLE]


def test_a_closed_port_refuses(listener: socket.socket) -> None:
    port = port_of(listener)
    assert try_connecting(f"127.0.0.1:{port}", "127.0.0.1", port).failure == ""
    listener.close()
    assert try_connecting(f"127.0.0.1:{port}", "127.0.0.1", port).failure == "refused"


def test_a_name_that_nobody_knows_is_no_address() -> None:
    assert try_connecting("no-such-host.invalid:1", "no-such-host.invalid", 1).failure == "name"


def test_a_peer_that_drops_what_arrives_times_out() -> None:
    # A queue of connections that is full answers nothing, as a firewall that drops.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        waiting = [socket.socket() for _ in range(8)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(listening.getsockname())
            peer = try_connecting("peer:1", "127.0.0.1", port_of(listening))
        finally:
            for one in waiting:
                one.close()
    if not peer.failure:
        pytest.skip("this system takes more connections than it was asked to")
    assert peer.failure == "timed out"
    assert "a firewall drops what is sent there" in judge_peer(peer).found


@pytest.mark.parametrize(
    ("failure", "health", "outcome", "words"),
    [
        ("", "SERVING", Outcome.OK, "takes this machine's fleet token"),
        ("", "NOT_SERVING", Outcome.OK, "takes this machine's fleet token"),
        (
            "",
            "UNAUTHENTICATED: the fleet token is missing",
            Outcome.FAILURE,
            "refuses this machine's fleet token",
        ),
        ("", "NOT_FOUND: None", Outcome.FAILURE, "not the fleet port"),
        ("", "UNAVAILABLE: handshake", Outcome.FAILURE, "is no gRPC server that answers"),
        ("refused", "", Outcome.FAILURE, "nothing listens on that port"),
        ("timed out", "", Outcome.FAILURE, "a firewall drops"),
        ("name", "", Outcome.FAILURE, "cannot be resolved"),
        ("unreachable", "", Outcome.FAILURE, "no route"),
        ("Broken pipe", "", Outcome.FAILURE, "Broken pipe"),
    ],
)
def test_every_answer_of_a_peer_means_something(
    failure: str, health: str, outcome: Outcome, words: str
) -> None:
    one = judge_peer(Peer("10.0.0.9:1028", failure, 3.0, health))
    assert (one.outcome, words in one.found) == (outcome, True), one
    assert judge_peer(None).outcome is Outcome.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("service", "token", "outcome", "words"),
    [
        (FLEET_SERVICE, "right", Outcome.OK, "takes this machine's fleet token"),
        (FLEET_SERVICE, "wrong", Outcome.FAILURE, "refuses this machine's fleet token"),
        ("expertmesh.v1.GenerationService", "right", Outcome.FAILURE, "not the fleet port"),
    ],
)
@pytest.mark.asyncio
async def test_a_router_says_whether_it_takes_the_token_and_which_port_it_is(
    service: str, token: str, outcome: Outcome, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    server = await start_server("127.0.0.1", 0, lambda _: None, (service,), [FleetTokenInterceptor("right")])
    try:
        one = judge_peer(await asyncio.to_thread(ask_router, server.address, load_config()))
    finally:
        await server.stop(0)
    assert (one.outcome, words in one.found) == (outcome, True), one


@pytest.mark.asyncio
async def test_a_server_of_something_else_is_no_router() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        one = judge_peer(await asyncio.to_thread(ask_router, f"{host}:{port}", load_config()))
    assert (one.outcome, "no gRPC server that answers" in one.found) == (Outcome.FAILURE, True), one
