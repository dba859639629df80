"""A hundred reloads under load: all workers change with the exchange, and no stream notices."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from protos import admin_pb2, admin_pb2_grpc
from tests.e2e.fleet import Answer, Fleet, fleet_of, generate

STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("Nothing is dropped silently, and", {"temperature": 0.0}),
    ("x", {"temperature": 0.9, "seed": 3, "top_k": 40}),
    ("1 2 3 4 5 6 7 8 9", {"temperature": 1.0, "seed": 4, "top_p": 0.9}),
]
LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logprobs": 1}
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "shared memory": (100, {"EXPERTMESH_SAME_HOST_TRANSPORT": "sharedMemory"}),
    "links": (30, {"EXPERTMESH_SAME_HOST_TRANSPORT": "links"}),
    "collective": (30, {"EXPERTMESH_EXCHANGE": "collective"}),
}
"""How many reloads, and how rows reach the workers."""
SETTLE_S = 20.0
MOST_MORE = 4
"""Descriptors and threads that come and go: of a message under way, of gRPC's pools."""


class Operator:
    """Reloads the configuration of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.channel = grpc.insecure_channel(fleet.admin_address)
        self.stub = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.document: dict[str, Any] = json.loads(self.get().config_json)

    def get(self) -> admin_pb2.GetConfigResponse:
        return self.stub.GetConfig(admin_pb2.GetConfigRequest(), timeout=5)

    def reload(self, ep_level: int, micro_batches: int) -> admin_pb2.ReloadConfigResponse:
        """Change the exchange; everything else stays as the fleet was started."""
        model = self.document["ModelDeployConfig"]["ModelConfig"][0]
        model.setdefault("models", {}).setdefault("deepseekv2", {})["ep_level"] = ep_level
        self.document.setdefault("ExpertMesh", {})["microBatches"] = micro_batches
        request = admin_pb2.ReloadConfigRequest(config_json=json.dumps(self.document))
        return self.stub.ReloadConfig(request, timeout=30)


def stream(fleet: Fleet, number: int) -> Answer:
    prompt, how = STREAMS[number % len(STREAMS)]
    return generate(fleet, prompt, **LONG, **how)


def keep_streaming(fleet: Fleet, number: int, is_over: list[bool]) -> list[Answer]:
    answers = []
    while not is_over:
        answers.append(stream(fleet, number))
    return answers


def sizes_of(fleet: Fleet) -> dict[int, tuple[int, int]]:
    """Descriptors and threads of every process of a fleet, by its id."""
    everyone = psutil.Process(fleet.process.pid).children(recursive=True)
    return {one.pid: (one.num_fds(), one.num_threads()) for one in everyone}


def grown(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> dict[int, Any]:
    """The processes that have more of either than before."""
    return {
        pid: (before[pid], sizes)
        for pid, sizes in after.items()
        if any(now > was + MOST_MORE for was, now in zip(before[pid], sizes, strict=True))
    }


@pytest.mark.e2e
@pytest.mark.parametrize("way", WAYS)
def test_reload_after_reload_between_steps_disturbs_no_stream_and_changes_no_bit(
    v3_model: Path, way: str
) -> None:
    num_reloads, environment = WAYS[way]
    with fleet_of(v3_model, "--expert-workers", "2", **environment) as fleet:
        expected = [stream(fleet, number) for number in range(len(STREAMS))]
        operator = Operator(fleet)
        first = operator.get().version
        epoch = fleet.status().epoch
        before = sizes_of(fleet)
        is_over: list[bool] = []
        took_s = []
        with ThreadPoolExecutor(len(STREAMS)) as pool:
            running: list[Future[list[Answer]]] = [
                pool.submit(keep_streaming, fleet, number, is_over) for number in range(len(STREAMS))
            ]
            try:
                for count in range(num_reloads):
                    began = time.monotonic()
                    response = operator.reload(ep_level=2 - count % 2, micro_batches=1 + count % 3)
                    took_s.append(time.monotonic() - began)
                    assert (response.applied, response.version) == (True, first + count + 1)
            finally:
                is_over.append(True)
        for number, future in enumerate(running):
            answers = future.result(60)
            assert answers
            assert all(answer == expected[number] for answer in answers)
        status = fleet.status()
        # Every worker has prepared every one of them.
        assert (status.ready, status.epoch) == (True, epoch + num_reloads)
        assert (status.config_version, status.ep_level) == (first + num_reloads, 1)
        assert max(took_s) < 10
        deadline = time.monotonic() + SETTLE_S
        while grown(before, sizes_of(fleet)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert grown(before, sizes_of(fleet)) == {}


@pytest.mark.e2e
def test_an_engine_that_is_killed_after_reloads_comes_back_with_the_configuration_in_force(
    v3_model: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with fleet_of(v3_model, "--expert-workers", "1", EXPERTMESH_STATE_DIR=str(state)) as fleet:
        before = stream(fleet, 0)
        operator = Operator(fleet)
        assert operator.reload(ep_level=2, micro_batches=2).version == 2
        assert stream(fleet, 0) == before
        fleet.engine().kill()
        fleet.wait_until(lambda status: not status.ready)
        status = fleet.wait_until(lambda status: status.ready)
        assert (status.config_version, status.ep_level) == (2, 2)
        assert stream(fleet, 0) == before
        assert sorted(path.name for path in state.glob("config-*")) == [
            "config-0000000001.json",
            "config-0000000002.json",
        ]
        router = fleet.engine().parent()
        assert isinstance(router, psutil.Process)
        # The file that `up` gave the router is as it was: reading it again takes the reload back.
        router.send_signal(signal.SIGHUP)
        status = fleet.wait_until(lambda status: status.config_version == 3)
        assert status.ep_level == 1
        assert stream(fleet, 0) == before
