"""Bounds on rows: more rounds, passes and messages, not one bit less. And replicas of experts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from common.exchange import Received, RowOrigins
from common.exchange.routing import RowShape
from common.placement import Placement, contiguous
from common.replica_choice import request_key
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, D, E, K, inputs, naive, run_step

pytestmark = pytest.mark.distributed

SHAPE = RowShape(D, K, torch.float32)
KINDS = ("links", "sharedMemory", "collective")


class Seen:
    """What each worker computed."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = defaultdict(list)
        self.experts: dict[int, list[list[int]]] = defaultdict(list)

    def __call__(self, rank: int, received: Received) -> None:
        self.rows[rank].append(received.rows.shape[0])
        self.experts[rank].append(received.tokens_per_expert.tolist())


@contextmanager
def workers(kind: str, placement: Placement) -> Iterator[tuple[fleet.RouterEnd, Seen]]:
    seen = Seen()
    small = fleet.ThreadFleet(1, placement, SHAPE, kind, watch=seen)
    try:
        yield small.routers[0], seen
    finally:
        small.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pass_rows", [K, 5, 16, 1000])
def test_a_worker_never_expands_more_rows_than_the_cutoff_and_counts_its_extra_passes(
    kind: str, pass_rows: int
) -> None:
    with workers(kind, contiguous(E, 2, [LAYER])) as (router, seen):
        given = inputs(64, torch.float32)
        found = run_step(router, 0, 1, given, fleet.TERM, pass_rows=pass_rows)
        assert torch.equal(found, naive(*given))
        assert max(max(rows) for rows in seen.rows.values()) <= pass_rows
        assert sum(sum(rows) for rows in seen.rows.values()) == 64 * K
        assert router.extra.passes == sum(len(rows) - 1 for rows in seen.rows.values())
        assert (router.extra.passes > 0) == (pass_rows < 64 * K)
        assert router.extra.rounds == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("round_rows", [1, 5, 64, 1000])
def test_a_worker_is_never_sent_more_rows_than_its_buffer_holds_and_rounds_are_counted(
    kind: str, round_rows: int
) -> None:
    with workers(kind, contiguous(E, 2, [LAYER])) as (router, seen):
        given = inputs(64, torch.float32)
        found = run_step(router, 0, 2, given, fleet.TERM, round_rows=round_rows)
        assert torch.equal(found, naive(*given))
        assert max(max(rows) for rows in seen.rows.values()) <= round_rows
        extra = sum(math.ceil(sum(rows) / round_rows) - 1 for rows in seen.rows.values())
        assert router.extra.rounds == extra
        assert (extra > 0) == (round_rows < 100)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_no_overflow_and_change_no_bit(kind: str) -> None:
    with workers(kind, contiguous(E, 2, [LAYER])) as (router, seen):
        given = inputs(64, torch.float32)
        found = run_step(router, 0, 2, given, fleet.TERM, chunk_rows=7)
        assert torch.equal(found, naive(*given))
        assert max(max(rows) for rows in seen.rows.values()) == 7
        assert router.extra.rounds == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_may_change_from_step_to_step(kind: str) -> None:
    with workers(kind, contiguous(E, 3, [LAYER])) as (router, _):
        steps: list[tuple[int, dict[str, int]]] = [
            (1, {"pass_rows": 4}),
            (2, {"round_rows": 3}),
            (1, {}),
            (2, {"chunk_rows": 9}),
            (2, {}),
        ]
        for step_id, (level, bounds) in enumerate(steps):
            given = inputs(30 + step_id, torch.float32)
            assert torch.equal(
                run_step(router, step_id, level, given, fleet.TERM, fleet.EPOCH, (), **bounds), naive(*given)
            )


REPLICATED = Placement({LAYER: ((0, 1, 2, 3), (4, 5, 6, 0), (7, 8, 0, 4))})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [1, 2])
def test_replicas_share_the_rows_of_an_expert_by_request_and_position_and_change_no_bit(
    kind: str, level: int
) -> None:
    given = inputs(64, torch.float32)
    origins = [
        RowOrigins(torch.tensor([request_key(f"request {i % 4}") for i in range(64)]), torch.arange(64) // 4)
    ]
    with workers(kind, REPLICATED) as (router, seen):
        for step_id, whose in enumerate(([], origins, origins)):
            found = run_step(router, step_id, level, given, fleet.TERM, origins=whose)
            assert torch.equal(found, naive(*given))
        first, second, third = ([seen.experts[rank][step] for rank in range(3)] for step in range(3))
    # Every token chose expert 0; three workers hold it, at local indices 0, 3 and 2.
    assert [first[0][0], first[1][3], first[2][2]] == [64, 0, 0]
    shares = [second[0][0], second[1][3], second[2][2]]
    assert sum(shares) == 64
    assert min(shares) > 5
    assert third == second  # a replay asks the same replicas
