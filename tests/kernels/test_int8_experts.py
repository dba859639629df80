"""Experts in int8: the bits of a plain loop, the same in every company, whoever quantised the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.int8_reference import quantize_rows
from common.quantization.w8a8 import Int8Weight, quantize_channels
from common.rows import swiglu
from expert_worker.experts import LayerExperts
from expert_worker.kernels import ExpertKernels, cpu, load_kernels
from tests.kernels.comparing import THREAD_COUNTS, assert_close, num_threads, randn, some_rows

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DEVICES = pytest.mark.parametrize("device", ["cpu", "reference"])

Weights = list[tuple[Int8Weight, Int8Weight, Int8Weight]]
"""gate_proj [F, D], up_proj [F, D] and down_proj [D, F] of every expert."""


def weights(num_experts: int, hidden_size: int, size: int) -> Weights:
    shapes = ((size, hidden_size), (size, hidden_size), (hidden_size, size))
    return [
        tuple(  # type: ignore[misc]
            quantize_channels(randn(10 * expert + part, *shape) * shape[1] ** -0.5)
            for part, shape in enumerate(shapes)
        )
        for expert in range(num_experts)
    ]


def layer(experts: Weights, dtype: torch.dtype, kernels: ExpertKernels = cpu) -> LayerExperts:
    gate, up, down = zip(*experts, strict=True)
    return LayerExperts(range(len(experts)), kernels.pack_int8(gate, up, down, dtype), kernels)


def naive(row: Tensor, expert: tuple[Int8Weight, Int8Weight, Int8Weight]) -> Tensor:  # [D] -> [D] float32
    """One row through one expert, in 64-bit integers."""

    def product(x: Tensor, weight: Int8Weight) -> Tensor:
        rows, scales = quantize_rows(x.unsqueeze(0))
        sums = (rows.long() * weight.weight.long()).sum(dim=1)
        return sums.float() * weight.scale * scales

    gate, up, down = expert
    return product(swiglu(product(row, gate), product(row, up)), down)


@FLOATS
def test_a_row_is_quantised_multiplied_and_quantised_again(dtype: torch.dtype) -> None:
    experts = weights(3, 48, 20)
    rows, counts = randn(4, 9, 48, dtype=dtype), torch.tensor([4, 0, 5])
    expected = torch.stack([naive(row, experts[0 if i < 4 else 2]) for i, row in enumerate(rows)]).to(dtype)
    assert torch.equal(layer(experts, dtype).forward(rows, counts), expected)


@FLOATS
@pytest.mark.parametrize(("hidden_size", "size"), [(64, 32), (24, 7), (2048, 1408)])
def test_int8_experts_give_a_row_the_same_bits_in_every_company(
    hidden_size: int, size: int, dtype: torch.dtype
) -> None:
    experts = layer(weights(3, hidden_size, size), dtype)
    rows = randn(4, 200, hidden_size, dtype=dtype)
    expert_of = torch.arange(200) * 3 // 200  # [R], sorted
    with num_threads(1):
        expected = experts.forward(rows, torch.bincount(expert_of, minlength=3))
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in (1, 2, 3, 5, 8, 17, 40, 199, 200) if size < 1000 else (1, 5, 40):
                chosen = some_rows(count, count, 200)
                chosen = chosen[torch.argsort(expert_of[chosen], stable=True)]
                output = experts.forward(rows[chosen], torch.bincount(expert_of[chosen], minlength=3))
                assert torch.equal(output, expected[chosen]), (count, threads)


@DEVICES
@FLOATS
def test_rows_that_arrive_quantised_give_the_bits_of_rows_that_are_quantised_here(
    device: str, dtype: torch.dtype
) -> None:
    experts = layer(weights(2, 64, 32), dtype, load_kernels(device))
    rows, counts = randn(4, 6, 64, dtype=dtype), torch.tensor([2, 4])
    quantised, row_scales = quantize_rows(rows)
    output = experts.forward(quantised, counts, row_scales=row_scales)
    assert output.dtype == dtype
    assert torch.equal(output, experts.forward(rows, counts))


@FLOATS
def test_the_devices_agree_but_for_a_step_of_the_rows_between_the_products(dtype: torch.dtype) -> None:
    experts = weights(2, 256, 128)
    rows, counts = randn(4, 50, 256, dtype=dtype), torch.tensor([20, 30])
    here, reference = (
        layer(experts, dtype, load_kernels(device)).forward(rows, counts) for device in ("cpu", "reference")
    )
    # SwiGLU's last bit may move a quantised value by one; bfloat16 may round the result the other way.
    assert_close(here, reference, 2.0**-7)


@DEVICES
def test_no_rows_give_no_rows_and_progress_counts_experts_or_the_call_that_ran_them(
    device: str,
) -> None:
    experts = layer(weights(3, 16, 8), torch.bfloat16, load_kernels(device))
    nothing = experts.forward(torch.empty(0, 16, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))
    assert (nothing.shape, nothing.dtype) == ((0, 16), torch.bfloat16)
    calls: list[None] = []
    rows = randn(4, 3, 16, dtype=torch.bfloat16)
    experts.forward(rows, torch.tensor([1, 0, 2]), on_progress=lambda: calls.append(None))
    assert len(calls) == (1 if experts.is_fused else 2)


@DEVICES
@FLOATS
@pytest.mark.parametrize("is_grouped", [False, True])
def test_what_is_written_into_given_memory_has_the_bits_of_a_new_tensor(
    device: str, dtype: torch.dtype, is_grouped: bool
) -> None:
    experts = layer(weights(3, 64, 32), dtype, load_kernels(device))
    for counts in ([0, 0, 0], [1, 0, 2], [20, 30, 0]):
        rows, scales = quantize_rows(randn(4, sum(counts), 64))
        given = (torch.tensor(counts), None, scales, is_grouped)
        expected = experts.forward(rows, *given)
        # As in a reply, whose header is no multiple of a vector.
        out = torch.full((4 + expected.numel(),), torch.nan, dtype=dtype)[4:].view(expected.shape)
        assert experts.forward(rows, *given, out) is out
        assert torch.equal(out, expected)
