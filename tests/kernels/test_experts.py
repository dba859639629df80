"""The experts of a layer: every row meets its own expert, and gets the same bits in every company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from expert_worker.experts import LayerExperts
from expert_worker.kernels import ExpertKernels, cpu, load_kernels
from tests.kernels.comparing import THREAD_COUNTS, num_threads, randn, some_rows

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "reference"])


def layer(
    num_experts: int, hidden_size: int, size: int, dtype: torch.dtype, kernels: ExpertKernels = cpu
) -> LayerExperts:
    gate = randn(1, num_experts, size, hidden_size, dtype=dtype) * hidden_size**-0.5
    up = randn(2, num_experts, size, hidden_size, dtype=dtype) * hidden_size**-0.5
    down = randn(3, num_experts, hidden_size, size, dtype=dtype) * size**-0.5
    return LayerExperts(range(num_experts), kernels.pack(iter(gate), iter(up), iter(down)), kernels)


def counts_of(chosen: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(chosen, minlength=num_experts)


@FLOATS
@pytest.mark.parametrize(("hidden_size", "size"), [(64, 32), (24, 7), (2048, 1408)])
def test_experts_give_a_row_the_same_bits_in_every_company(
    hidden_size: int, size: int, dtype: torch.dtype
) -> None:
    experts = layer(3, hidden_size, size, dtype)
    rows = randn(4, 200, hidden_size, dtype=dtype)
    expert_of = torch.arange(200) * 3 // 200  # [R], sorted
    with num_threads(1):
        expected = experts.forward(rows, counts_of(expert_of, 3))
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in (1, 2, 3, 5, 8, 17, 40, 199, 200) if size < 1000 else (1, 5, 40):
                chosen = some_rows(count, count, 200)
                chosen = chosen[torch.argsort(expert_of[chosen], stable=True)]
                output = experts.forward(rows[chosen], counts_of(expert_of[chosen], 3))
                assert torch.equal(output, expected[chosen]), (count, threads)


@DEVICES
@FLOATS
def test_no_rows_give_no_rows(device: str, dtype: torch.dtype) -> None:
    experts = layer(3, 16, 8, dtype, load_kernels(device))
    output = experts.forward(torch.empty(0, 16, dtype=dtype), torch.zeros(3, dtype=torch.int64))
    assert output.shape == (0, 16)
    assert output.dtype == dtype


@DEVICES
def test_experts_without_rows_are_passed_over(device: str) -> None:
    experts = layer(4, 16, 8, torch.float32, load_kernels(device))
    rows = randn(4, 5, 16)
    together = experts.forward(rows, torch.tensor([0, 2, 0, 3]))
    apart = [
        experts.forward(rows[:2], torch.tensor([0, 2, 0, 0])),
        experts.forward(rows[2:], torch.tensor([0, 0, 0, 3])),
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-6)


@DEVICES
def test_progress_is_reported_once_for_each_expert_that_has_rows(device: str) -> None:
    experts = layer(4, 16, 8, torch.float32, load_kernels(device))
    calls: list[None] = []
    experts.forward(randn(4, 6, 16), torch.tensor([1, 0, 2, 3]), on_progress=lambda: calls.append(None))
    assert len(calls) == 3  # none of these devices runs float32 experts in one call


@DEVICES
def test_quantised_rows_stand_for_themselves_times_their_scale(device: str) -> None:
    experts = layer(2, 16, 8, torch.float32, load_kernels(device))
    rows = (randn(4, 5, 16) * 40).to(torch.int8)
    scales = randn(5, 5).abs()
    counts = torch.tensor([2, 3])
    output = experts.forward(rows, counts, row_scales=scales)
    assert torch.equal(output, experts.forward(rows.float() * scales.unsqueeze(1), counts))


def test_packing_holds_every_weight_once() -> None:
    gate, up, down = randn(1, 2, 8, 16), randn(2, 2, 8, 16), randn(3, 2, 16, 8)
    packed = cpu.pack(list(gate), list(up), list(down))
    assert [tuple(weight.shape) for weight in packed.gate_up] == [(16, 16)] * 2
    assert torch.equal(packed.gate_up[1], torch.cat([gate[1], up[1]]))
    assert packed.down[1].data_ptr() == down[1].data_ptr()


def test_packing_refuses_projections_of_different_numbers_of_experts() -> None:
    with pytest.raises(ValueError, match="zip"):
        cpu.pack([randn(1, 8, 16)] * 2, [randn(2, 8, 16)] * 2, [randn(3, 16, 8)])


@DEVICES
@FLOATS
@pytest.mark.parametrize("is_grouped", [False, True])
def test_what_is_written_into_given_memory_has_the_bits_of_a_new_tensor(
    device: str, dtype: torch.dtype, is_grouped: bool
) -> None:
    experts = layer(3, 64, 32, dtype, load_kernels(device))
    for counts in ([0, 0, 0], [1, 0, 2], [20, 30, 0]):
        rows = randn(4, sum(counts), 64, dtype=dtype)
        given = (torch.tensor(counts), None, None, is_grouped)
        expected = experts.forward(rows, *given)
        # As in a reply, whose header is no multiple of a vector.
        out = torch.full((4 + expected.numel(),), torch.nan, dtype=dtype)[4:].view(expected.shape)
        assert experts.forward(rows, *given, out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "out", [torch.empty(2, 16), torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(16, 3).t()]
)
def test_memory_that_does_not_fit_the_result_is_refused(out: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot take the result of rows"):
        layer(1, 16, 8, torch.float32).forward(randn(4, 3, 16), torch.tensor([3]), out=out)
