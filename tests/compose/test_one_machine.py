"""compose/cpu.yaml on a real engine, by the commands of docs/deploy.md: it serves, and it heals."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.compose.machine import Machine, answer, document, serves, status, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]
START, ASK, ADD_SPARE, CHANGE_SIZE, END = range(1, 6)
RESTARTED_S = 120.0
# From inside: all but the first process, which then ends by itself, and the container with it.
KILL_EVERYTHING = "import os, signal; os.kill(-1, signal.SIGKILL)"
MAY_DO = {"CapEff": "0000000000000000", "NoNewPrivs": "1"}
WRITE = """
import errno, sys
try:
    open('/opt/x', 'w')
except OSError as error:
    sys.exit(error.errno != errno.EROFS)
sys.exit('/opt could be written')
"""


@pytest.fixture(scope="module")
def one_machine(built: Machine) -> Iterator[Machine]:
    """Three workers and a router that serves."""
    try:
        built.run(document("One machine")[START])
        wait_until(lambda: serves(built.address("PORT")), "the fleet serves")
        yield built
    finally:
        built.run("docker compose -f compose/cpu.yaml logs --no-color --tail 60 > logs || true")
        built.run("docker compose -f compose/cpu.yaml down --timeout 5")


def workers(machine: Machine) -> list[str]:
    """The containers of the workers that run."""
    return machine.run("docker compose -f compose/cpu.yaml ps -q expert-worker").split()


def members(machine: Machine) -> set[str]:
    """The workers of the epoch in force, by the containers that the first part of their names is of."""
    found = status(machine.address("MANAGEMENT_PORT")).workers
    return {worker.worker_id.partition("-")[0] for worker in found if worker.state == "serving"}


def test_three_workers_stream_the_answer_of_one_process(one_machine: Machine, expected: list[int]) -> None:
    assert len(expected) == 16
    assert answer(one_machine.address("PORT")) == expected
    shown, said = one_machine.run(document("One machine")[ASK]).split("\n", 1)
    assert shown
    assert said.strip()
    assert len(members(one_machine)) == 3


@pytest.mark.parametrize("service", ["router", "expert-worker"])
def test_doctor_finds_nothing_wrong_in_a_container(one_machine: Machine, service: str) -> None:
    command = f"docker compose -f compose/cpu.yaml exec -T {service} python -m expertmesh doctor"
    shown = json.loads(one_machine.run(f"{command} --config /etc/expertmesh/config.json --json"))
    assert [one for one in shown["findings"] if one["outcome"] == "failure"] == []
    known = {(one["subject"], one["outcome"]): one["found"] for one in shown["findings"]}
    if service == "router":
        assert "a service of expertmesh runs already" in known["ports", "warning"]
    else:
        assert known["router", "ok"] == "router:1028 is a fleet port, and takes this machine's fleet token"


def test_a_worker_that_is_killed_comes_back_under_its_name_and_serves(
    one_machine: Machine, expected: list[int]
) -> None:
    machine, before = one_machine, members(one_machine)
    management = machine.address("MANAGEMENT_PORT")
    epoch, victim = status(management).epoch, workers(machine)[0]
    starts = json.loads(machine.engine.docker("inspect", victim))[0]["State"]["StartedAt"]
    machine.run(f"docker exec {victim} python -c '{KILL_EVERYTHING}' || true")
    # How long it does not serve in between depends on what it was doing; the next epoch is certain.
    wait_until(
        lambda: status(management).epoch > epoch and serves(machine.address("PORT")),
        "the fleet serves again",
        RESTARTED_S,
    )
    assert members(machine) == before
    assert json.loads(machine.engine.docker("inspect", victim))[0]["State"]["StartedAt"] > starts
    assert answer(machine.address("PORT")) == expected


def test_a_router_that_is_killed_comes_back_and_finds_its_workers(
    one_machine: Machine, expected: list[int]
) -> None:
    machine, before = one_machine, members(one_machine)
    term = status(machine.address("MANAGEMENT_PORT")).term
    script = f"docker compose -f compose/cpu.yaml exec -T router python -c '{KILL_EVERYTHING}' || true"
    machine.run(script)
    wait_until(lambda: status(machine.address("MANAGEMENT_PORT")).term > term, "a new router is there")
    wait_until(lambda: serves(machine.address("PORT")), "the fleet serves again", RESTARTED_S)
    assert members(machine) == before
    assert answer(machine.address("PORT")) == expected


def test_a_spare_takes_over_when_a_worker_stays_away(one_machine: Machine, expected: list[int]) -> None:
    machine, before = one_machine, members(one_machine)
    machine.run(document("One machine")[ADD_SPARE])
    address = machine.address("MANAGEMENT_PORT")
    wait_until(lambda: len(status(address).workers) == 4, "the spare has registered", RESTARTED_S)
    assert members(machine) == before
    victim = next(name for name in workers(machine) if name[:12] in before)
    # Docker takes a kill by its own command for the operator's will and does not start the container again.
    machine.engine.docker("kill", victim)
    wait_until(
        lambda: serves(machine.address("PORT")) and victim[:12] not in members(machine),
        "the spare has taken over",
        RESTARTED_S,
    )
    assert len(members(machine) & before) == 2
    assert answer(machine.address("PORT")) == expected


def test_every_container_becomes_healthy(one_machine: Machine) -> None:
    names = one_machine.run("docker compose -f compose/cpu.yaml ps -q").split()

    def health() -> set[str]:
        found = [json.loads(one_machine.engine.docker("inspect", name))[0]["State"] for name in names]
        return {state["Health"]["Status"] for state in found if state["Running"]}

    wait_until(lambda: health() == {"healthy"}, "all are healthy", 60.0)


@pytest.mark.parametrize("service", ["router", "expert-worker"])
def test_a_container_may_do_nothing_but_serve(one_machine: Machine, service: str) -> None:
    name = one_machine.run(f"docker compose -f compose/cpu.yaml ps -q {service}").split()[-1]
    docker = one_machine.engine.docker
    said = docker("exec", name, "grep", "-E", "^(Uid|CapEff|NoNewPrivs):", "/proc/1/status")
    found = dict(line.split(":\t") for line in said.splitlines())
    assert found == {"Uid": "1000\t1000\t1000\t1000", **MAY_DO}
    docker("exec", name, "python", "-c", WRITE)


def test_the_fleet_token_is_in_no_image_and_in_no_environment(one_machine: Machine) -> None:
    token = (one_machine.directory / "compose" / "fleet-token").read_text().strip()
    assert len(token) == 64
    docker = one_machine.engine.docker
    names = one_machine.run("docker compose -f compose/cpu.yaml ps -q").split()
    shown = [docker("inspect", *names), docker("history", "--no-trunc", "expertmesh:tests")]
    assert [text for text in shown if token in text] == []


def test_the_group_takes_another_size(one_machine: Machine, expected: list[int]) -> None:
    one_machine.run(document("One machine")[CHANGE_SIZE])
    address = one_machine.address("PORT")
    wait_until(lambda: serves(address) and len(members(one_machine)) == 2, "two workers serve")
    assert answer(address) == expected


def test_the_fleet_ends_in_its_grace_period_and_leaves_nothing(one_machine: Machine) -> None:
    one_machine.run("docker compose -f compose/cpu.yaml stop")
    names = one_machine.run("docker compose -f compose/cpu.yaml ps -q").split()
    states = [json.loads(one_machine.engine.docker("inspect", name))[0]["State"] for name in names]
    assert [state["ExitCode"] for state in states] == [0] * 3
    one_machine.run(document("One machine")[END])
    assert one_machine.engine.docker("ps", "--all", "--quiet", "--filter", "name=expertmesh-tests-one") == ""
