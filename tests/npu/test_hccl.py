"""The exchange over torch_npu's real ProcessGroupHCCL, on a fake HCCL that moves bytes between ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from common.exchange import StepHeader
from common.exchange.collective_group import HCCL_BUFFER_MB
from common.exchange.routing import RowShape
from common.placement import contiguous
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, D, E, K, inputs, naive

NPU = torch.device("npu")


def on_npu(given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(one.to(NPU) for one in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_go_to_the_workers_and_back_with_the_bits_of_a_naive_loop(
    workers: int, dtype: torch.dtype, calls: Path
) -> None:
    small = fleet.ThreadFleet(1, contiguous(E, workers, [LAYER]), RowShape(D, K, dtype), kind="hccl")
    try:
        (router,) = small.routers
        for step_id, (level, num_tokens) in enumerate(itertools.product((1, 2, 1), (1, 0, 17))):
            given = inputs(num_tokens, dtype)
            router.begin(StepHeader(fleet.TERM, fleet.EPOCH, step_id, level, num_tokens))
            found = router.combine(router.dispatch(LAYER, 0, *on_npu(given)))
            assert found.device.type == "npu"
            assert torch.equal(found.cpu(), naive(*given))
    finally:
        small.close()
    seen = calls.read_text().splitlines()
    assert {"HcclAlltoAllV", "HcclBroadcast"} <= set(seen)
    assert not any(line.startswith(("refused", "stuck")) for line in seen)
    assert f"communicator rank=0 size={workers + 1} buffer={HCCL_BUFFER_MB}" in seen


@pytest.mark.parametrize("level", [1, 2])
def test_micro_batches_and_rounds_are_in_flight_at_the_same_time(level: int) -> None:
    small = fleet.ThreadFleet(1, contiguous(E, 2, [LAYER]), RowShape(D, K, torch.float32), kind="hccl")
    try:
        (router,) = small.routers
        parts = [inputs(num_tokens, torch.float32) for num_tokens in (5, 0, 12, 2)]
        router.begin(
            StepHeader(fleet.TERM, fleet.EPOCH, 0, level, 12, micro_batches=4, round_rows=7, pass_rows=8)
        )
        flights = [router.dispatch(LAYER, number, *on_npu(given)) for number, given in enumerate(parts)]
        for number in (2, 0, 3, 1):
            assert torch.equal(router.combine(flights[number]).cpu(), naive(*parts[number]))
        assert router.extra.rounds + router.extra.passes > 0
    finally:
        small.close()
