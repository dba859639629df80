"""What people see of a fleet: the snapshot of `status`, and the lines while it loads."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from expertmesh.cli import loading
from expertmesh.cli.status import print_snapshot
from protos import admin_pb2


def snapshot_of(*, ready: bool) -> admin_pb2.GetStatusResponse:
    snapshot = admin_pb2.GetStatusResponse(
        ready=ready,
        not_ready_reason="" if ready else "1 of 2 expert workers is missing [worker-1]",
        epoch=3,
        ep_level=2,
        model_name="tiny",
        engine_loaded_bytes=50_000_000,
        engine_total_bytes=100_000_000,
        warnings=["npuMemSize is ignored: it sizes the cache on an NPU"],
    )
    worker = snapshot.workers.add(ep_rank=0, worker_id="worker-0", state="serving", device="cpu")
    worker.num_local_experts = 4
    worker.loaded_bytes = 12_000_000
    worker.last_step.compute_s = 0.0125
    return snapshot


def printed(snapshot: admin_pb2.GetStatusResponse) -> str:
    text = io.StringIO()
    print_snapshot(snapshot, Console(file=text, width=160))
    return text.getvalue()


def test_a_snapshot_names_the_state_of_the_fleet_and_each_worker() -> None:
    text = printed(snapshot_of(ready=True))
    assert "tiny is ready" in text
    assert "epoch 3, ep_level 2" in text
    assert "worker-0" in text
    assert "12.50 ms" in text
    assert "warning: npuMemSize is ignored" in text


def test_a_fleet_that_is_not_ready_says_why_word_for_word() -> None:
    assert "tiny is not ready: 1 of 2 expert workers is missing [worker-1]" in printed(
        snapshot_of(ready=False)
    )


def test_losses_are_told_once_there_was_one() -> None:
    snapshot = snapshot_of(ready=True)
    assert "survived" not in printed(snapshot)
    snapshot.recoveries, snapshot.recovery_seconds, snapshot.replayed_steps_total = 3, 1.534, 2
    assert "3 losses survived, the last in 1.53 s; 2 steps computed again" in printed(snapshot)


def test_output_that_is_no_terminal_has_no_colour() -> None:
    assert "\x1b" not in printed(snapshot_of(ready=True))


def test_loading_off_a_terminal_is_a_line_when_it_is_due(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LINE_EVERY_S", 0.0)
    snapshot = snapshot_of(ready=False)
    loading.Lines().show(loading.amounts_of(snapshot), "1 of 2 is missing")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loading: router 50/100 MB, worker-0 12 MB (1 of 2 is missing)\n"
