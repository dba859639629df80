"""Rows that leave the router quantised: the bits of quantising at the expert, and half the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import int8_reference, process_group
from common.errors import WorkerLost
from common.exchange import Received, StepHeader
from common.exchange.arrival import Arrival
from common.exchange.loopback import LoopbackExchange
from common.exchange.routing import RowShape
from common.placement import contiguous
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, TOKENS, D, E, K, inputs, naive, run_step

pytestmark = pytest.mark.distributed
KINDS = pytest.mark.parametrize("kind", ["links", "sharedMemory", "collective"])
OTHER_LAYER = 2
WIDE = 4096


def int8_shape(hidden_size: int = D, dtype: torch.dtype = torch.bfloat16) -> RowShape:
    return RowShape(hidden_size, K, dtype, frozenset({LAYER}))


def rounded(hidden: Tensor) -> Tensor:
    """What is left of rows after int8, number by number: 127 stands for the largest of a row."""
    rows = []
    for row in hidden.float():
        scale = row.abs().max() / 127
        rows.append(torch.stack([torch.round(number / scale) * scale for number in row]))
    return torch.stack(rows) if rows else hidden.float()


@contextmanager
def workers(
    kind: str, num_workers: int, shape: RowShape, layers: tuple[int, ...] = (LAYER,)
) -> Iterator[tuple[fleet.RouterEnd, list[Received]]]:
    seen: list[Received] = []
    placement = contiguous(E, num_workers, layers)
    small = fleet.ThreadFleet(1, placement, shape, kind, watch=lambda _, received: seen.append(received))
    try:
        yield small.routers[0], seen
    finally:
        small.close()


def expected_of(given: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Experts of float32 rows, whose outputs go home in `dtype`, one token and slot after another."""
    hidden, ids, weights = given
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    rows = rounded(hidden)
    for token, slot in itertools.product(range(len(rows)), range(K)):
        output = fleet.expert_output(rows[token : token + 1], int(ids[token, slot]))[0].to(dtype)
        total[token] += (output.float() * weights[token, slot]).double()
    return total.float()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_rows_arrive_as_int8_with_a_scale_each_and_give_the_bits_of_a_naive_loop(
    kind: str, num_workers: int, dtype: torch.dtype
) -> None:
    bounds: list[dict[str, int]] = [{}, {"chunk_rows": 7}, {"round_rows": 5}]
    with workers(kind, num_workers, int8_shape(dtype=dtype)) as (router, seen):
        for step_id, (num_tokens, bound) in enumerate(itertools.product(TOKENS, bounds)):
            given = inputs(num_tokens, dtype)
            found = run_step(router, step_id, 2, given, fleet.TERM, **bound)  # type: ignore[arg-type]
            assert torch.equal(found, expected_of(given, dtype))
        assert {received.rows.dtype for received in seen} == {torch.int8}
        assert all(received.row_scales is not None for received in seen)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_loopback_hands_over_the_same_int8_rows(num_tokens: int) -> None:
    own = tuple(range(E))
    loopback = LoopbackExchange(
        lambda _, rows, scales, counts, __: fleet.compute(own, rows, counts, scales).bfloat16(),
        {LAYER: own},
        frozenset({LAYER}),
    )
    given = inputs(num_tokens, torch.bfloat16)
    assert torch.equal(run_step(loopback, 0, 2, given, 0), expected_of(given, torch.bfloat16))


@KINDS
def test_rows_of_other_layers_and_of_ep_level_1_stay_in_the_models_dtype(kind: str) -> None:
    given = inputs(17, torch.bfloat16)
    with workers(kind, 2, int8_shape(), (LAYER, OTHER_LAYER)) as (router, seen):
        for step_id, level in enumerate((1, 2)):
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, step_id, level, 17, micro_batches=2))
            for layer_id, micro_batch in itertools.product((LAYER, OTHER_LAYER), (0, 1)):
                found = router.combine(router.dispatch(layer_id, micro_batch, *given))
                is_int8 = (level, layer_id) == (2, LAYER)
                assert torch.equal(found, expected_of(given, torch.bfloat16) if is_int8 else naive(*given))
                assert {one.rows.dtype for one in seen} == {torch.int8 if is_int8 else torch.bfloat16}
                assert all((one.row_scales is not None) == is_int8 for one in seen)
                seen.clear()


@KINDS
def test_a_token_is_quantised_once_however_many_experts_it_goes_to(kind: str) -> None:
    quantised: list[int] = []

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        quantised.append(len(rows))
        return int8_reference.quantize_rows(rows)

    shape, given = RowShape(D, K, torch.bfloat16, frozenset({LAYER}), quantize), inputs(17, torch.bfloat16)
    with workers(kind, 3, shape) as (router, seen):
        assert torch.equal(run_step(router, 0, 2, given, fleet.TERM), expected_of(given, torch.bfloat16))
        assert sum(len(one.rows) for one in seen) == 17 * K
    assert quantised == [17]


def test_a_message_of_int8_rows_has_half_the_bytes_of_one_in_bfloat16() -> None:
    given, placement, sizes = inputs(64, torch.bfloat16, WIDE), contiguous(E, 2, [LAYER]), list[int]()

    def watch(_: int, received: Received) -> None:
        assert isinstance(received.handle, Arrival)
        sizes.append(received.handle.header.num_bytes)

    for shape in (RowShape(WIDE, K, torch.bfloat16), int8_shape(WIDE)):
        small = fleet.ThreadFleet(1, placement, shape, watch=watch)
        run_step(small.routers[0], 0, 2, given, fleet.TERM)
        small.close()
    in_bfloat16, in_int8 = sum(sizes[:2]), sum(sizes[2:])
    # A number has one byte less; a row has four more.
    assert in_bfloat16 - in_int8 == 64 * K * (WIDE - 4)
    assert in_int8 < 0.51 * in_bfloat16


def written_bytes() -> int:
    """What this process has handed to the system so far, to sockets too."""
    (line,) = [one for one in Path("/proc/self/io").read_text().splitlines() if one.startswith("wchar")]
    return int(line.split()[1])


def test_the_system_is_handed_half_the_bytes_for_int8_rows() -> None:
    given = inputs(64, torch.bfloat16, WIDE)
    written = []
    for shape in (RowShape(WIDE, K, torch.bfloat16), int8_shape(WIDE)):
        store, placement = process_group.open_store("127.0.0.1"), contiguous(E, 1, [LAYER])
        child = fleet.start_worker(store, 0, placement, shape, 0.0, "collective")
        try:
            router = fleet.join_workers(store, placement, shape, kind="collective")
            run_step(router, 0, 2, given, fleet.TERM)
            before = written_bytes()
            run_step(router, 1, 2, given, fleet.TERM)
            written.append(written_bytes() - before)
            router.close()
        finally:
            child.kill()
            child.wait(5)
    rows = 64 * K * WIDE
    assert written[0] >= 2 * rows
    assert rows <= written[1] < 0.55 * written[0]


@KINDS
@pytest.mark.parametrize(
    ("sent", "taken", "reason"),
    [
        (int8_shape(), RowShape(D, K, torch.bfloat16), "came in int8, but its experts here take bfloat16"),
        (RowShape(D, K, torch.bfloat16), int8_shape(), "came in bfloat16, but its experts here take int8"),
    ],
)
def test_rows_in_a_form_the_experts_do_not_take_are_refused_by_name(
    kind: str, sent: RowShape, taken: RowShape, reason: str
) -> None:
    placement, store = contiguous(E, 1, [LAYER]), process_group.open_store("127.0.0.1")
    closed: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(
            fleet.join_routers,
            [store],
            0,
            placement,
            taken,
            0.0,
            kind,
            lambda term, epoch, why: closed.append(why),
        )
        router = fleet.join_workers(store, placement, sent, kind=kind)
        exchange, _ = joined.result(fleet.JOIN_S)
        received = pool.submit(exchange.receive, fleet.JOIN_S)
        with pytest.raises(WorkerLost):
            run_step(router, 0, 2, inputs(17, torch.bfloat16), fleet.TERM)
        exchange.close()
        assert received.result(fleet.JOIN_S) is None
    assert [f"rows of layer {LAYER} {reason}" in why for why in closed] == [True]
