"""The two services without `expertmesh up`, as compose and Kubernetes run them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.e2e.fleet import STOP_TIMEOUT_S, Answer, Fleet, generate
from tests.rank_tables import write_table

pytestmark = pytest.mark.e2e

READY_TIMEOUT_S = 60.0
SHORT = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
PROMPT = "Whoever wakes up first"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Services:
    """Processes that are started one by one and share a configuration file."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.ports = dict(zip(("grpc", "admin", "fleet"), free_ports(3), strict=True))
        self.config = folder / "config.json"
        self.lines: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []
        (folder / "token").write_text("a-token-of-the-tests")
        document = {
            "ServerConfig": {"port": self.ports["grpc"], "managementPort": self.ports["admin"]},
            "ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": str(model), "worldSize": 2}]},
            "ExpertMesh": {
                "fleetPort": self.ports["fleet"],
                "fleetTokenFile": str(folder / "token"),
                "router": f"127.0.0.1:{self.ports['fleet']}",
            },
        }
        self.config.write_text(json.dumps(document))

    def router(self, **environment: str) -> subprocess.Popen[str]:
        return self._start("router", **environment)

    def worker(self, name: str, **environment: str) -> subprocess.Popen[str]:
        return self._start("expert_worker", "--worker-id", name, **environment)

    def _start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(self.config), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self._processes.append(process)
        threading.Thread(target=self._collect, args=(process,), daemon=True).start()
        return process

    def _collect(self, process: subprocess.Popen[str]) -> None:
        with process.stderr or open(os.devnull) as stream:
            self.lines.extend(iter(stream.readline, ""))

    def wait_ready(self, router: subprocess.Popen[str]) -> Fleet:
        """Wait as a load balancer would: by the health service of the client's port."""
        address = f"127.0.0.1:{self.ports['grpc']}"
        deadline = time.monotonic() + READY_TIMEOUT_S
        with grpc.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return Fleet(router, address, f"127.0.0.1:{self.ports['admin']}", self.lines)
                except grpc.RpcError:
                    pass
                time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_TIMEOUT_S} s:\n{''.join(self.lines[-60:])}")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def services(folder: Path, model: Path) -> Iterator[Services]:
    """Nothing runs yet; nothing runs afterwards."""
    running = Services(folder, model)
    try:
        yield running
    finally:
        running.close()


def answer(fleet: Fleet) -> Answer:
    return generate(fleet, PROMPT, **SHORT)


def test_services_start_in_any_order_and_workers_find_the_next_router(v3_model: Path, tmp_path: Path) -> None:
    with services(tmp_path, v3_model) as running:
        workers = [running.worker("a"), running.worker("b")]  # before there is a router
        router = running.router()
        fleet = running.wait_ready(router)
        expected = answer(fleet)
        term = fleet.status().term
        router.kill()
        router.wait()
        fleet = running.wait_ready(running.router())
        status = fleet.status()
        assert status.term > term
        assert {worker.worker_id for worker in status.workers} == {"a", "b"}
        assert [worker.poll() for worker in workers] == [None, None]
        assert answer(fleet) == expected


def test_a_rank_table_gives_every_worker_its_rank_and_refuses_a_stranger(
    v3_model: Path, tmp_path: Path
) -> None:
    table = write_table(tmp_path, {"127.0.0.1": {0: 1}, "127.0.0.2": {0: 0}})
    with services(tmp_path, v3_model) as running:
        router = running.router(RANK_TABLE_FILE=str(table))
        running.worker("a")
        stranger = running.worker("stranger", EXPERTMESH_DATA_ADDRESS="127.0.0.3")
        assert stranger.wait(READY_TIMEOUT_S) == 2
        assert "expert worker stranger is refused: the rank table has no server" in "".join(running.lines)
        running.worker("b", EXPERTMESH_DATA_ADDRESS="127.0.0.2")
        fleet = running.wait_ready(router)
        assert [worker.worker_id for worker in fleet.status().workers] == ["b", "a"]
        assert len(answer(fleet).token_ids) == SHORT["max_tokens"]


def test_every_service_ends_cleanly_on_sigterm_and_takes_its_child_along(
    v3_model: Path, tmp_path: Path
) -> None:
    with services(tmp_path, v3_model) as running:
        processes = [running.router(), running.worker("a"), running.worker("b")]
        answer(running.wait_ready(processes[0]))
        children = [child for one in processes for child in psutil.Process(one.pid).children()]
        assert len(children) == 3
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(STOP_TIMEOUT_S) for process in processes] == [0, 0, 0]
        _, alive = psutil.wait_procs(children, timeout=5)
        assert alive == []


def test_every_port_of_the_router_tells_what_it_serves(v3_model: Path, tmp_path: Path) -> None:
    with services(tmp_path, v3_model) as running:
        router = running.router()
        running.worker("a")
        running.worker("b")
        fleet = running.wait_ready(router)
        for address, service in (
            (fleet.grpc_address, "expertmesh.v1.GenerationService"),
            (fleet.admin_address, "expertmesh.v1.AdminService"),
        ):
            with grpc.insecure_channel(address) as channel:
                stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                (response,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
                names = [one.name for one in response.list_services_response.service]
                assert {service, "grpc.health.v1.Health"} <= set(names)
                health: Any = health_pb2_grpc.HealthStub(channel)
                answered = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                assert answered.status == health_pb2.HealthCheckResponse.SERVING
