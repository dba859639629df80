"""Rows through windows: the real operators of torch_npu over a fake HCCL whose windows are shared memory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.errors import WorkerLost
from common.exchange import StepHeader, collective_windows
from common.exchange.routing import RowShape
from common.exchange.slot_tables import SlotTables
from common.npu_windows import WindowLayout
from common.placement import Placement, contiguous
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, E, K, inputs
from tests.npu.fleet_of_processes import FLOOR_S, NPU, ProcessFleet, assert_naive, process_fleet

D = 1024
CAPACITY = 24
A2F, F2A, LANES = "aclnnAttentionToFFN", "aclnnFFNToAttention", "HcclAlltoAllV"


@contextmanager
def windows(
    placement: Placement,
    log: Path,
    dtype: torch.dtype = torch.bfloat16,
    delays: Sequence[float] = (),
) -> Iterator[ProcessFleet]:
    layout = WindowLayout(CAPACITY, K, D, placement.ep_size * SlotTables(placement).most_local)
    with process_fleet(placement, log, RowShape(D, K, dtype), layout, delays) as small:
        small.calls()
        yield small


@pytest.mark.parametrize(("workers", "dtype"), [(1, torch.bfloat16), (3, torch.bfloat16), (2, torch.float16)])
def test_rows_have_the_bits_of_a_naive_loop_and_larger_steps_go_by_the_lanes(
    workers: int, dtype: torch.dtype, calls: Path
) -> None:
    with windows(contiguous(E, workers, [LAYER]), calls, dtype) as small:
        for num_tokens in (1, 17, 0, CAPACITY, 2):
            given = inputs(num_tokens, dtype, D)
            assert_naive(small.run(given), [given])
        seen = small.calls()
        assert seen.count(A2F) == 4
        assert seen.count(F2A) >= 4
        assert LANES not in seen
        given = inputs(CAPACITY + 1, dtype, D)
        for level in (2, 1):
            assert_naive(small.run(given, level=level), [given])
        seen = small.calls()
        assert LANES in seen
        assert A2F not in seen
        assert_naive(small.run(inputs(3, dtype, D)), [inputs(3, dtype, D)])
        assert A2F in small.calls()


def test_one_micro_batch_is_in_the_windows_at_a_time_and_a_full_buffer_keeps_rows_out_of_them(
    calls: Path,
) -> None:
    with windows(contiguous(E, 2, [LAYER]), calls) as small:
        parts = [inputs(num_tokens, torch.bfloat16, D) for num_tokens in (5, 0, 12, 2)]
        for _ in range(2):
            assert_naive(small.run(*parts), parts)
        assert small.calls().count(A2F) == 2
        assert_naive(small.run(*parts[2:], round_rows=7), parts[2:])
        assert small.calls().count(A2F) == 1  # of the part that has fewer rows


def test_replicas_and_workers_with_different_numbers_of_experts_are_reached(calls: Path) -> None:
    placement = Placement({LAYER: ((0, 1, 2, 3, 8), (3, 4, 5), (6, 7, 0))})
    given = inputs(9, torch.bfloat16, D)
    with windows(placement, calls) as small:
        assert_naive(small.run(given), [given])
        assert A2F in small.calls()


@pytest.mark.parametrize("how", ["killed", "stopped", "stuck"])
def test_a_worker_that_is_gone_in_the_middle_of_a_layer_is_missed_within_the_deadline(
    how: str, calls: Path
) -> None:
    delays = (0.0, 60.0 if how == "stuck" else 0.0, 0.0)
    with windows(contiguous(E, 3, [LAYER]), calls, delays=delays) as small:
        # Every token goes to two experts of worker 0 and one of worker 1; worker 2 is told nothing.
        given = (*inputs(9, torch.bfloat16, D)[:1], torch.tensor([[0, 4, 1]] * 9), torch.rand(9, K))
        if how != "stuck":
            assert_naive(small.run(given), [given])
        num_kept, began = len(collective_windows._kept), time.monotonic()
        small.router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 2, 2, 9))
        if how != "stuck":
            small.workers[1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        if how == "killed":
            small.workers[1].wait(10)
        with pytest.raises(WorkerLost) as lost:
            small.router.combine(small.router.dispatch(LAYER, 0, *(one.to(NPU) for one in given)))
        assert time.monotonic() - began < 3 * FLOOR_S
        assert lost.value.layer_id == LAYER
        assert lost.value.phase == "combine" or how == "killed"
        # One that is stopped keeps the others from their metadata, so that no worker moves.
        assert lost.value.worker == "w1" or how == "stopped"
        wait_until(lambda: len(collective_windows._kept) > num_kept)  # the worker may still write there


def test_rows_with_another_reply_behind_them_are_not_taken(calls: Path) -> None:
    with windows(contiguous(E, 2, [LAYER]), calls) as small:
        given = tuple(one.to(NPU) for one in inputs(4, torch.bfloat16, D))
        small.router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 1, 2, 4))
        flight = small.router.dispatch(LAYER, 0, *given)
        window = small.router._window
        assert window is not None
        wait_until(lambda: bool((window.flags[: 4 * K] == 1).all()))
        window._rows[3, D] = 1.5
        with pytest.raises(WorkerLost, match="no reply was expected"):
            small.router.combine(flight)


@pytest.mark.parametrize("where", ["everywhere", "at one worker"])
def test_without_windows_rows_go_by_the_lanes(
    where: str, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "8")
    monkeypatch.setenv("FAKE_CANN_NO_WINDOWS", "every rank" if where == "everywhere" else "1")
    given = inputs(5, torch.bfloat16, D)
    with windows(contiguous(E, 2, [LAYER]), calls) as small:
        assert small.router._window is None
        assert_naive(small.run(given), [given])
        assert A2F not in small.calls()


def wait_until(holds: object, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)
