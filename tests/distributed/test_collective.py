"""Groups of a router and its workers over Gloo: the bits of a naive loop, and what a lost worker costs."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from common import process_group
from common.errors import LinkError, WorkerLost
from common.exchange import StepHeader
from common.exchange.collective import CollectiveExpertExchange, join_group
from common.exchange.routing import RowShape
from common.placement import Placement, contiguous
from common.process_group import StoreServer
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, TOKENS, D, E, K, inputs, naive, run_step

pytestmark = pytest.mark.distributed
SHAPE = RowShape(D, K, torch.float32)
Progress = Callable[[int], int | None]


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Threads end with the groups they serve."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


@contextlib.contextmanager
def threads(
    routers: int, placement: Placement, shape: RowShape = SHAPE, **options: object
) -> Iterator[fleet.ThreadFleet]:
    with nothing_left_behind():
        small = fleet.ThreadFleet(routers, placement, shape, **{"kind": "collective", **options})  # type: ignore[arg-type]
        try:
            yield small
        finally:
            small.close()


@contextlib.contextmanager
def processes(
    workers: int, shape: RowShape = SHAPE, delay_s: float = 0.05, **options: object
) -> Iterator[tuple[fleet.RouterEnd, list[subprocess.Popen[bytes]]]]:
    placement = contiguous(E, workers, [LAYER])
    store = process_group.open_store("127.0.0.1")
    children = [
        fleet.start_worker(store, rank, placement, shape, delay_s, "collective") for rank in range(workers)
    ]
    settings = {"ask_progress": progress_of(children), **options}
    with nothing_left_behind():
        try:
            router = fleet.join_workers(store, placement, shape, kind="collective", **settings)  # type: ignore[arg-type]
            yield router, children
            router.close()
        finally:
            for child in children:
                child.kill()
                child.wait(5)


def progress_of(children: list[subprocess.Popen[bytes]]) -> Progress:
    """What the agents would say: processor time used, None for a worker that is stopped or dead."""

    def ask(ep_rank: int) -> int | None:
        fields = Path(f"/proc/{children[ep_rank].pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "TZX" else int(fields[11]) + int(fields[12])

    return ask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("routers", [1, 2])
def test_groups_give_the_bits_of_a_naive_loop_at_both_levels(
    routers: int, workers: int, dtype: torch.dtype
) -> None:
    with threads(routers, contiguous(E, workers, [LAYER]), RowShape(D, K, dtype)) as small:
        for step_id, (level, num_tokens) in enumerate(itertools.product((1, 2, 1), TOKENS)):
            for number, router in enumerate(small.routers):
                given = inputs(num_tokens + number, dtype)
                found = run_step(router, step_id, level, given, fleet.TERM + number)
                assert torch.equal(found, naive(*given))


@pytest.mark.parametrize("level", [1, 2])
def test_groups_and_links_give_the_same_bits_for_a_ragged_placement(level: int) -> None:
    placement = Placement({1: ((8, 2, 0, 5), (1,), (3, 4, 6, 7)), 4: ((), (7, 6, 5, 4, 3, 2, 1, 0), (8,))})
    shape, given = RowShape(D, K, torch.bfloat16), inputs(33, torch.bfloat16)
    found = []
    for kind in ("links", "sharedMemory", "collective"):
        with threads(1, placement, shape, kind=kind) as small:
            (router,) = small.routers
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 0, level, 33))
            found.append([router.combine(router.dispatch(layer_id, 0, *given)) for layer_id in (1, 4)])
            times = router.last_step_times()
            assert len(times) == 3
            assert all(seconds >= 0 for one in times for seconds in one)
    for linked, shared, collected in zip(*found, strict=True):
        assert torch.equal(linked, shared)
        assert torch.equal(linked, collected)


@pytest.mark.parametrize("kind", ["sharedMemory", "collective"])
@pytest.mark.parametrize("level", [1, 2])
def test_micro_batches_may_be_combined_out_of_order(level: int, kind: str) -> None:
    parts = [inputs(num_tokens, torch.float32) for num_tokens in (5, 0, 12, 2)]
    with threads(1, contiguous(E, 3, [LAYER]), kind=kind) as small:
        (router,) = small.routers
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 0, level, 19, micro_batches=4))
        flights = [router.dispatch(LAYER, number, *given) for number, given in enumerate(parts)]
        for number in (2, 0, 3, 1):
            assert torch.equal(router.combine(flights[number]), naive(*parts[number]))


def test_replies_may_be_given_out_of_order() -> None:
    parts = [inputs(num_tokens, torch.float32) for num_tokens in (5, 2)]
    store, exchange = process_group.open_store("127.0.0.1"), CollectiveExpertExchange(lambda *reason: None)
    with nothing_left_behind():
        router = join_all(store, {0: exchange})
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 0, 1, 7, micro_batches=2))
        flights = [router.dispatch(LAYER, number, *given) for number, given in enumerate(parts)]
        arrived = [exchange.receive(5.0) for _ in parts]
        for received in reversed(arrived):
            assert received is not None
            counts = received.tokens_per_expert
            exchange.reply(fleet.compute(tuple(range(E)), received.rows, counts), received)
        for flight, given in zip(flights, parts, strict=True):
            assert torch.equal(router.combine(flight), naive(*given))
        router.close()
        exchange.close()


def test_dispatch_returns_while_a_worker_stands_still_and_close_does_not_wait_for_it() -> None:
    wide = RowShape(16384, K, torch.float32)  # 4 MB of hidden states fit no socket buffer
    given = inputs(64, torch.float32, wide.hidden_size)
    with processes(1, wide, floor_s=5.0, ask_progress=None) as (router, (child,)):
        for level in (1, 2):
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, level, level, 64))
            os.kill(child.pid, signal.SIGSTOP)
            start = time.monotonic()
            flight = router.dispatch(LAYER, 0, *given)
            assert time.monotonic() - start < 1.0
            os.kill(child.pid, signal.SIGCONT)
            assert torch.equal(router.combine(flight), naive(*given))
        os.kill(child.pid, signal.SIGSTOP)
        router.dispatch(LAYER, 0, *given)
        start = time.monotonic()
        router.close()
        assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    ("fault", "limit_s", "level"),
    [(signal.SIGKILL, 0.5, 1), (signal.SIGSTOP, 1.0, 2), (signal.SIGSTOP, 1.0, 1)],
)
def test_a_lost_worker_is_named_with_layer_and_phase(
    fault: signal.Signals, limit_s: float, level: int
) -> None:
    with processes(2, floor_s=0.3) as (router, children):
        given = inputs(17, torch.float32)
        assert torch.equal(run_step(router, 0, level, given, fleet.TERM), naive(*given))
        router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 1, level, 17))
        flight = router.dispatch(LAYER, 0, *given)
        os.kill(children[1].pid, fault)
        start = time.monotonic()
        with pytest.raises(WorkerLost) as lost:
            router.combine(flight)
        assert time.monotonic() - start < limit_s
        assert (lost.value.worker, lost.value.layer_id, lost.value.phase) == ("w1", LAYER, "combine")
        assert "out of reach or stopped" in lost.value.cause
        assert lost.value.num_bytes > 0
        start = time.monotonic()
        router.close()
        with pytest.raises(LinkError, match="closed"):
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, 2, level, 17))
        assert time.monotonic() - start < 0.5


def test_a_slow_worker_is_kept_while_it_moves_although_the_other_has_nothing_left_to_do() -> None:
    ticks = itertools.count()
    with threads(
        1,
        contiguous(E, 2, [LAYER]),
        delay_s=0.4,
        floor_s=0.05,
        ask_progress=lambda ep_rank: next(ticks) if ep_rank else 7,
    ) as small:
        given = inputs(2, torch.float32)
        assert torch.equal(run_step(small.routers[0], 0, 2, given, fleet.TERM), naive(*given))
        assert next(ticks) > 1


def test_when_no_worker_moves_the_cause_says_that_the_name_is_a_guess() -> None:
    with threads(
        1, contiguous(E, 2, [LAYER]), delay_s=0.6, floor_s=0.05, ask_progress=lambda ep_rank: 7
    ) as small:
        with pytest.raises(
            WorkerLost, match="no worker makes progress, this is merely the first of 2"
        ) as lost:
            run_step(small.routers[0], 0, 2, inputs(2, torch.float32), fleet.TERM)
        assert lost.value.ep_rank == 0


@pytest.mark.parametrize(
    ("level", "disagreement", "reason"),
    [
        (1, {"shape": RowShape(2 * D, K, torch.float32)}, "2788 bytes was announced: it should have 1700"),
        (2, {"shape": RowShape(2 * D, K, torch.float32)}, "4352 bytes was announced: it should have 2176"),
        (2, {"shape": RowShape(D, K, torch.bfloat16)}, "1088 bytes was announced: it should have 2176"),
        (2, {"placement": contiguous(6, 2, [LAYER])}, "opened with magic 0x45584d4553483031 for 3 experts"),
        (2, {"placement": contiguous(18, 2, [LAYER])}, "rows per expert [0, 0, 0, 17, 17] do not sum to 51"),
        (2, {"placement": contiguous(E, 2, [LAYER + 1, LAYER + 2])}, "no rows belong to layer 2"),
    ],
)
def test_a_router_that_disagrees_is_refused_before_anything_is_taken_and_the_other_goes_on(
    level: int, disagreement: dict[str, object], reason: str
) -> None:
    placement = contiguous(E, 2, [LAYER])
    with threads(1, placement) as small:
        assert_step(small, 0)
        shape, theirs = disagreement.get("shape", SHAPE), disagreement.get("placement", placement)
        assert isinstance(shape, RowShape)
        assert isinstance(theirs, Placement)
        stranger = join_all(
            small.stores[0], small.experts, term=fleet.TERM + 9, placement=theirs, shape=shape
        )
        ids, weights = torch.tensor([[3, 4, 5]]).expand(17, K), torch.ones(17, K)
        stranger.begin(StepHeader(fleet.TERM + 9, fleet.EPOCH, 0, level, 17))
        hidden = torch.ones(17, shape.hidden_size, dtype=shape.dtype)
        with pytest.raises(WorkerLost):
            stranger.combine(stranger.dispatch(min(theirs.layers), 0, hidden, ids, weights))
        wait_until(lambda: any(reason in why for _, term, why in small.closed if term == fleet.TERM + 9))
        assert_step(small, 1)


def test_a_newer_epoch_takes_over_with_its_first_step() -> None:
    with threads(1, contiguous(E, 2, [LAYER])) as small:
        assert_step(small, 0)
        newer = join_all(small.stores[0], small.experts, epoch=fleet.EPOCH + 1)
        assert_step(small, 1)
        given = inputs(17, torch.float32)
        for step_id in range(2):
            summed = run_step(newer, step_id, 2, given, fleet.TERM, fleet.EPOCH + 1)
            assert torch.equal(summed, naive(*given))
        with pytest.raises(WorkerLost):
            run_step(small.routers[0], 2, 2, given, fleet.TERM)
        newer.close()


def test_forget_ends_the_step_of_its_router_and_leaves_the_other() -> None:
    with threads(2, contiguous(E, 2, [LAYER])) as small:
        given = inputs(17, torch.float32)
        for number, router in enumerate(small.routers):
            run_step(router, 0, 2, given, fleet.TERM + number)
        small.experts[0].forget(fleet.TERM)
        with pytest.raises(WorkerLost):
            run_step(small.routers[0], 1, 2, given, fleet.TERM)
        summed = run_step(small.routers[1], 1, 2, given, fleet.TERM + 1)
        assert torch.equal(summed, naive(*given))


def test_a_group_leaves_nothing_in_the_store_and_says_who_did_not_come() -> None:
    with threads(1, contiguous(E, 3, [LAYER])) as small:
        assert_step(small, 0)
        (store,) = small.stores
        assert store.store.list_keys() == []
        start = time.monotonic()
        with pytest.raises(LinkError, match="group alone of 2 ranks"):
            join_group(store.host, store.port, "alone", 0, 2, 0.3, "127.0.0.1")
        assert time.monotonic() - start < 3.0


def wait_until(is_true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Poll a claim that other threads make true, such as that they have ended."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_step(small: fleet.ThreadFleet, step_id: int) -> None:
    """The first router of the fleet works."""
    given = inputs(17, torch.float32)
    assert torch.equal(run_step(small.routers[0], step_id, 2, given, fleet.TERM), naive(*given))


def join_all(
    store: StoreServer,
    experts: Mapping[int, fleet.ExpertEnd],
    *,
    term: int = fleet.TERM,
    epoch: int = fleet.EPOCH,
    placement: Placement | None = None,
    shape: RowShape = SHAPE,
) -> fleet.RouterEnd:
    """A router, or an epoch, for all these workers; its placement and shape may differ from theirs."""
    theirs = contiguous(E, len(experts), [LAYER])
    joining = [
        threading.Thread(target=fleet.add_router, args=(exchange, store, rank, theirs, SHAPE, term, epoch))
        for rank, exchange in experts.items()
    ]
    for thread in joining:
        thread.start()
    router = fleet.join_workers(store, placement or theirs, shape, term, "collective", epoch)
    for thread in joining:
        thread.join(fleet.JOIN_S)
    return router
