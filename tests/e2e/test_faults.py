"""What dies, stalls or stays away: the reason is told, the fleet serves again, nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.e2e.fleet import STOP_TIMEOUT_S, fleet_of, generate

LONG = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
SHORT = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
PROMPT = "Nothing is dropped silently, and"


def reason_of(error: grpc.RpcError) -> str:
    """The ErrorInfo reason of a failed call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # the call is its own error
    for detail in status.details if status else ():
        found = error_details_pb2.ErrorInfo()
        if detail.Unpack(found):
            return found.reason
    return ""


@pytest.mark.e2e
def test_when_a_worker_stays_away_streams_end_with_its_name_and_later_requests_are_refused(
    v3_model: Path,
) -> None:
    timeout = {"EXPERTMESH_RECOVERY_TIMEOUT_SECONDS": "2"}
    with fleet_of(v3_model, "--expert-workers", "2", **timeout) as fleet, ThreadPoolExecutor(1) as pool:
        before = generate(fleet, PROMPT, **SHORT)
        stream = pool.submit(generate, fleet, PROMPT, **LONG)
        fleet.wait_until(lambda status: status.num_requests_running == 1 and status.num_steps > 20)
        with fleet.without_executor(1):
            error = stream.exception(timeout=30)
            assert isinstance(error, grpc.RpcError), f"the stream ended with {error!r}"
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert reason_of(error) == "WORKER_LOST"
            for word in ("expert worker worker-", "layer", "phase", "within 2.0 s"):
                assert word in (error.details() or "")
            with pytest.raises(grpc.RpcError) as caught:
                generate(fleet, PROMPT, **SHORT)
            assert reason_of(caught.value) == "NOT_READY"
            assert fleet.status().kv_blocks_used == 0
        fleet.wait_until(lambda status: status.ready)
        assert generate(fleet, PROMPT, **SHORT) == before


@pytest.mark.e2e
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_up_killed_in_any_way_leaves_no_process_behind(v3_model: Path, how: signal.Signals) -> None:
    with fleet_of(v3_model, "--expert-workers", "2") as fleet:
        family = psutil.Process(fleet.process.pid).children(recursive=True)
        assert len(family) >= 6  # router, engine, two agents, two executors
        fleet.process.send_signal(how)
        fleet.process.wait(STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        assert not alive
        if how != signal.SIGKILL:
            assert fleet.process.returncode == 0


@pytest.mark.e2e
@pytest.mark.parametrize("transport", ["sharedMemory", "links"])
def test_an_idle_fleet_burns_no_cpu(v3_model: Path, transport: str) -> None:
    told = {"EXPERTMESH_SAME_HOST_TRANSPORT": transport}
    with fleet_of(v3_model, "--expert-workers", "2", **told) as fleet:
        generate(fleet, PROMPT, **SHORT)
        time.sleep(1.0)
        family = psutil.Process(fleet.process.pid).children(recursive=True)
        before = sum(sum(one.cpu_times()[:2]) for one in family)
        time.sleep(4.0)
        used_s = sum(sum(one.cpu_times()[:2]) for one in family) - before
    assert used_s < 4.0 * 0.05, f"{used_s:.2f} s of processor time in 4 s of idleness"


@pytest.mark.e2e
def test_cancelled_and_overdue_calls_free_their_blocks(v3_model: Path) -> None:
    with fleet_of(v3_model, "--expert-workers", "2") as fleet:
        with pytest.raises(grpc.RpcError) as caught:
            generate(fleet, PROMPT, timeout=1.0, **{**LONG, "max_tokens": 4000})
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        fleet.wait_until(
            lambda status: status.kv_blocks_used == 0 and status.num_requests_running == 0, deadline_s=5
        )


@pytest.mark.e2e
def test_a_port_in_use_ends_up_with_one_sentence(v3_model: Path) -> None:
    from tests.e2e.fleet import command

    with fleet_of(v3_model, "--expert-workers", "0") as fleet:
        port = fleet.grpc_address.rsplit(":", 1)[1]
        second = subprocess.run(
            command("up", "--model", str(v3_model), "--port", port, "--expert-workers", "1"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert second.returncode != 0
    assert port in second.stderr
    assert "Traceback" not in second.stderr
