"""The exchange over torch_npu's real ProcessGroupHCCL, on a fake HCCL that moves bytes between processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from common.exchange.collective_group import HCCL_BUFFER_MB
from common.exchange.routing import RowShape
from common.placement import contiguous
from tests.distributed.naive import LAYER, D, E, K, inputs
from tests.npu.fleet_of_processes import assert_naive, process_fleet


@pytest.mark.parametrize(("workers", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_rows_go_to_the_workers_and_back_with_the_bits_of_a_naive_loop(
    workers: int, dtype: torch.dtype, calls: Path
) -> None:
    with process_fleet(contiguous(E, workers, [LAYER]), calls, RowShape(D, K, dtype)) as small:
        for level, num_tokens in itertools.product((1, 2, 1), (1, 0, 17)):
            given = inputs(num_tokens, dtype)
            assert_naive(small.run(given, level=level), [given])
        seen = small.calls()
    assert {"HcclAlltoAllV", "HcclBroadcast"} <= set(seen)
    assert not any(line.startswith(("refused", "stuck")) for line in seen)
    assert f"communicator rank=0 size={workers + 1} buffer={HCCL_BUFFER_MB}" in seen


def test_micro_batches_and_rounds_are_in_flight_at_the_same_time(calls: Path) -> None:
    with process_fleet(contiguous(E, 2, [LAYER]), calls, RowShape(D, K, torch.float32)) as small:
        parts = [inputs(num_tokens, torch.float32) for num_tokens in (5, 0, 12, 2)]
        for level in (1, 2):
            before = small.router.extra.rounds + small.router.extra.passes
            assert_naive(small.run(*parts, level=level, round_rows=7, pass_rows=8), parts)
            assert small.router.extra.rounds + small.router.extra.passes > before
