"""Links and loopback against a naive loop, and what happens when a worker dies or stalls."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

import pytest
import torch

from common import process_group
from common.errors import LinkError, WorkerLost
from common.exchange import StepHeader
from common.exchange.loopback import LoopbackExchange
from common.exchange.routing import RowShape
from common.placement import contiguous
from common.timeline import Timeline
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, TOKENS, D, E, K, inputs, naive, run_step

pytestmark = pytest.mark.distributed
LINKS = ("links", "sharedMemory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("routers", [1, 2])
@pytest.mark.parametrize("kind", LINKS)
def test_links_give_the_bits_of_a_naive_loop_at_both_levels(
    kind: str, routers: int, workers: int, dtype: torch.dtype
) -> None:
    small = fleet.ThreadFleet(routers, contiguous(E, workers, [LAYER]), RowShape(D, K, dtype), kind)
    try:
        for step_id, (level, num_tokens) in enumerate(itertools.product((1, 2, 1), TOKENS)):
            for number, router in enumerate(small.routers):
                given = inputs(num_tokens + number, dtype)
                found = run_step(router, step_id, level, given, fleet.TERM + number)
                assert torch.equal(found, naive(*given))
    finally:
        small.close()


@pytest.mark.parametrize("kind", [*LINKS, "collective"])
def test_two_routers_run_at_their_own_pace_while_one_of_them_is_idle(kind: str) -> None:
    small = fleet.ThreadFleet(3, contiguous(E, 2, [LAYER]), RowShape(D, K, torch.float32), kind=kind)
    found: dict[int, int] = {}

    def run(number: int, steps: int, pause_s: float) -> None:
        for step_id in range(steps):
            given = inputs(3 + number, torch.float32)
            summed = run_step(small.routers[number], step_id, 1 + step_id % 2, given, fleet.TERM + number)
            found[number] = found.get(number, 0) + int(torch.equal(summed, naive(*given)))
            time.sleep(pause_s)

    try:
        slow = threading.Thread(target=run, args=(1, 4, 0.1))
        slow.start()
        run(0, 30, 0.0)  # router 2 has never begun a step
        slow.join(10)
        run(2, 1, 0.0)
        assert found == {0: 30, 1: 4, 2: 1}
    finally:
        small.close()


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_loopback_gives_the_bits_of_a_naive_loop(num_tokens: int) -> None:
    experts = {LAYER: tuple(range(E))}
    loopback = LoopbackExchange(
        lambda layer, rows, scales, counts, _: fleet.compute(experts[layer], rows, counts),
        experts,
    )
    given = inputs(num_tokens, torch.float32)
    assert torch.equal(run_step(loopback, 0, 2, given, 0), naive(*given))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("fault", "limit_s"), [(signal.SIGKILL, 0.3), (signal.SIGSTOP, 1.0)])
@pytest.mark.parametrize("kind", LINKS)
def test_a_lost_worker_is_named_with_layer_and_phase(
    kind: str, fault: signal.Signals, limit_s: float, level: int
) -> None:
    placement, shape = contiguous(E, 2, [LAYER]), RowShape(D, K, torch.float32)
    store = process_group.open_store("127.0.0.1")
    children = [fleet.start_worker(store, rank, placement, shape, 0.05, kind) for rank in range(2)]
    try:
        router = fleet.join_workers(
            store, placement, shape, kind=kind, floor_s=0.3, ask_progress=lambda rank: 1
        )
        given = inputs(17, torch.float32)
        assert torch.equal(run_step(router, 0, level, given, fleet.TERM), naive(*given))
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 1, level, 17))
        flight = router.dispatch(LAYER, 0, *given)
        os.kill(children[0].pid, fault)
        start = time.monotonic()
        with pytest.raises(WorkerLost) as lost:
            router.combine(flight)
        assert time.monotonic() - start < limit_s
        assert (lost.value.worker, lost.value.layer_id, lost.value.phase) == ("w0", LAYER, "combine")
        assert lost.value.num_bytes > 0
        with pytest.raises(LinkError):
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 2, level, 17))
    finally:
        for child in children:
            child.kill()
            child.wait(5)


@pytest.mark.parametrize("kind", [*LINKS, "collective"])
def test_another_deadline_floor_acts_from_the_next_rows_on(kind: str) -> None:
    placement, shape = contiguous(E, 2, [LAYER]), RowShape(D, K, torch.float32)
    store = process_group.open_store("127.0.0.1")
    children = [fleet.start_worker(store, rank, placement, shape, 0.05, kind) for rank in range(2)]
    try:
        router = fleet.join_workers(
            store, placement, shape, kind=kind, floor_s=60.0, ask_progress=lambda rank: 1
        )
        given = inputs(17, torch.float32)
        assert torch.equal(run_step(router, 0, 2, given, fleet.TERM), naive(*given))
        router.set_deadline_floor(0.3)
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 1, 2, 17))
        flight = router.dispatch(LAYER, 0, *given)
        os.kill(children[0].pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerLost):
            router.combine(flight)
        assert time.monotonic() - start < 5.0
    finally:
        for child in children:
            child.kill()
            child.wait(5)


@pytest.mark.parametrize("kind", LINKS)
def test_a_slow_worker_that_makes_progress_is_kept_and_shared_work_overlaps(kind: str) -> None:
    placement, shape = contiguous(E, 1, [LAYER]), RowShape(D, K, torch.float32)
    store = process_group.open_store("127.0.0.1")
    child = fleet.start_worker(store, 0, placement, shape, 0.4, kind)
    ticks = itertools.count()
    timeline = Timeline()
    try:
        router = fleet.join_workers(
            store,
            placement,
            shape,
            kind=kind,
            floor_s=0.05,
            ask_progress=lambda rank: next(ticks),
            timeline=timeline,
        )
        given = inputs(2, torch.float32)
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 0, 2, 2))
        flight = router.dispatch(LAYER, 0, *given)
        start_ns = time.monotonic_ns()
        time.sleep(0.1)
        end_ns = time.monotonic_ns()
        assert torch.equal(router.combine(flight), naive(*given))
        experts = next(span for span in timeline.spans if span.name == "experts")
        assert min(experts.end_ns, end_ns) - max(experts.start_ns, start_ns) > 50_000_000
        router.close()
    finally:
        child.kill()
        child.wait(5)


@pytest.mark.parametrize("kind", LINKS)
def test_a_foreign_epoch_drops_that_router_alone(kind: str) -> None:
    small = fleet.ThreadFleet(2, contiguous(E, 2, [LAYER]), RowShape(D, K, torch.float32), kind)
    try:
        given = inputs(17, torch.float32)
        stranger, friend = small.routers
        with pytest.raises(WorkerLost):
            run_step(stranger, 0, 2, given, fleet.TERM, epoch=fleet.EPOCH + 1)
        assert torch.equal(run_step(friend, 0, 2, given, fleet.TERM + 1), naive(*given))
    finally:
        small.close()


@pytest.mark.parametrize("kind", LINKS)
def test_forget_ends_the_step_of_its_router_and_leaves_the_other(kind: str) -> None:
    small = fleet.ThreadFleet(2, contiguous(E, 1, [LAYER]), RowShape(D, K, torch.float32), kind)
    try:
        given = inputs(17, torch.float32)
        for number, router in enumerate(small.routers):
            run_step(router, 0, 2, given, fleet.TERM + number)
        small.experts[0].forget(fleet.TERM)
        with pytest.raises(WorkerLost):
            run_step(small.routers[0], 1, 2, given, fleet.TERM)
        assert torch.equal(run_step(small.routers[1], 1, 2, given, fleet.TERM + 1), naive(*given))
    finally:
        small.close()
