"""Experts that write into the memory of their reply: the bits of a copy, whatever carries the rows."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from common.errors import WorkerLost
from common.exchange import Received
from common.exchange.routing import RowShape
from common.placement import contiguous
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, TOKENS, D, E, K, inputs, naive, run_step

pytestmark = pytest.mark.distributed
WORKERS = 3
BOUNDS: tuple[dict[str, int], ...] = ({}, {"chunk_rows": 7}, {"round_rows": 5}, {})
IN_PLACE = pytest.mark.parametrize("is_in_place", [False, True], ids=["copied", "in place"])


@IN_PLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["links", "sharedMemory", "collective"])
def test_what_is_written_into_the_reply_has_the_bits_of_what_is_copied(
    kind: str, dtype: torch.dtype, is_in_place: bool
) -> None:
    offered: dict[int, set[bool]] = {1: set(), 2: set()}
    level = 2

    def watch(_: int, received: Received) -> None:
        output = received.output
        offered[level].add(output is not None)
        if output is not None:
            assert (output.shape, output.dtype) == (received.rows.shape, dtype)
            output.fill_(torch.nan)  # what lies there is of an earlier message

    placement, shape = contiguous(E, WORKERS, [LAYER]), RowShape(D, K, dtype)
    small = fleet.ThreadFleet(1, placement, shape, kind, watch=watch, is_in_place=is_in_place)
    try:
        steps = itertools.count()
        for level, bound, num_tokens in itertools.product((2, 1, 2), BOUNDS, TOKENS):
            given = inputs(num_tokens, dtype)
            found = run_step(small.routers[0], next(steps), level, given, fleet.TERM, **bound)  # type: ignore[arg-type]
            assert torch.equal(found, naive(*given))
    finally:
        small.close()
    assert offered == {1: {False}, 2: {kind != "collective"}}


@IN_PLACE
@pytest.mark.parametrize("kind", ["links", "sharedMemory"])
def test_int8_rows_are_answered_in_the_models_dtype(kind: str, is_in_place: bool) -> None:
    placement = contiguous(E, WORKERS, [LAYER])
    shape = RowShape(D, K, torch.bfloat16, frozenset({LAYER}))
    small = fleet.ThreadFleet(1, placement, shape, kind, is_in_place=is_in_place)
    one = fleet.ThreadFleet(1, contiguous(E, 1, [LAYER]), shape, "collective")
    try:
        for step_id, num_tokens in enumerate(TOKENS * 3):
            given = inputs(num_tokens, torch.bfloat16)
            found, expected = (run_step(of.routers[0], step_id, 2, given, fleet.TERM) for of in (small, one))
            assert torch.equal(found, expected)
    finally:
        small.close()
        one.close()


@pytest.mark.parametrize("kind", ["links", "sharedMemory"])
def test_the_memory_of_a_reply_outlives_its_link(kind: str) -> None:
    def drop(rank: int, received: Received) -> None:
        dropped.append(received.term)  # before the router can hear of it
        small.experts[rank].forget(received.term)

    dropped: list[int] = []
    placement, shape = contiguous(E, 1, [LAYER]), RowShape(D, K, torch.bfloat16)
    small = fleet.ThreadFleet(2, placement, shape, kind, watch=drop, is_in_place=True)
    try:
        for number, router in enumerate(small.routers):
            given = inputs(17, torch.bfloat16)
            with contextlib.suppress(WorkerLost):  # unless the reply overtakes the goodbye
                found = run_step(router, 0, 2, given, fleet.TERM + number)
                assert torch.equal(found, naive(*given))
        assert dropped == [fleet.TERM, fleet.TERM + 1]
    finally:
        small.close()
