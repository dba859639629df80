"""The CPU's kernels compute what the plain ones do, and attention what float64 says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common import rows
from expert_worker.kernels import load_kernels as load_expert_kernels
from router.kernels import cpu, reference
from tests.kernels.comparing import assert_close, randn

FLOAT32_ERROR = 2e-6
BFLOAT16_ERROR = 2.0**-7  # one unit in the last place
FLOATS = pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, FLOAT32_ERROR), (torch.bfloat16, BFLOAT16_ERROR)],
    ids=["float32", "bfloat16"],
)


@FLOATS
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 33), (17, 64, 24), (40, 2048, 64)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_the_plain_one(
    shape: tuple[int, int, int], has_bias: bool, dtype: torch.dtype, error: float
) -> None:
    x, weight = randn(1, shape[0], shape[1], dtype=dtype), randn(2, shape[2], shape[1], dtype=dtype)
    bias = randn(3, shape[2], dtype=dtype) if has_bias else None
    assert_close(cpu.linear(x, weight, bias), reference.linear(x, weight, bias), error)


@FLOATS
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (33, 2, 7, 33), (5, 16, 128, 512)], ids=str)
def test_per_head_linear_is_the_plain_one(
    shape: tuple[int, int, int, int], dtype: torch.dtype, error: float
) -> None:
    tokens, heads, size, out = shape
    x, weight = randn(1, tokens, heads, size, dtype=dtype), randn(2, heads, out, size, dtype=dtype)
    assert_close(rows.per_head_linear(x, weight), reference.per_head_linear(x, weight), error)


@FLOATS
def test_row_operations_are_the_plain_ones(dtype: torch.dtype, error: float) -> None:
    x, y, weight = randn(1, 9, 96, dtype=dtype) * 4, randn(2, 9, 96, dtype=dtype), randn(3, 96, dtype=dtype)
    assert_close(cpu.swiglu(x, y), reference.swiglu(x, y), error)
    assert_close(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), error)


def test_swiglu_is_finite_where_the_exponential_is_not() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    assert cpu.swiglu(gate, torch.ones(1, 5)).tolist() == [[0.0, 0.0, 0.0, 100.0, 1e4]]


def test_rotate_turns_each_pair_of_neighbours_as_a_complex_number() -> None:
    x, angles = randn(1, 5, 3, 8), randn(2, 5, 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(5, 4), angles).unsqueeze(
        1
    )
    expected = torch.view_as_real(turned).flatten(-2)
    assert_close(reference.rotate(x, angles.cos(), angles.sin()), expected, FLOAT32_ERROR)


def test_latents_come_back_from_the_slots_they_were_stored_in() -> None:
    cache = torch.full((6, 4, 5), float("nan"))
    kv_c, k_pe = randn(1, 7, 3), randn(2, 7, 2)
    block_table = torch.tensor([4, 1])
    reference.store_latents(cache, torch.tensor([16, 17, 18, 19, 4, 5, 6]), kv_c, k_pe)
    assert torch.equal(cpu.gather_latents(cache, block_table, 7), torch.cat([kv_c, k_pe], dim=1))
    assert torch.equal(cpu.gather_latents(cache, block_table, 3), torch.cat([kv_c, k_pe], dim=1)[:3])


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    weights = (query.double() @ keys.double().T * scale).softmax(dim=-1)
    return weights @ values.double()


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("heads", "start", "count", "tile"), [(1, 0, 1, 4), (2, 70, 90, 16), (17, 5, 130, 24)]
)
def test_prefill_attention_is_causal_softmax_attention(
    module: object, heads: int, start: int, count: int, tile: int
) -> None:
    q, k = randn(1, count, heads, 24), randn(2, start + count, heads, 24)
    v = randn(3, start + count, heads, 18)
    actual = module.prefill_attention(q, k, v, start, 0.5, tile)  # type: ignore[attr-defined]
    expected = torch.empty(count, heads, 18, dtype=torch.float64)
    for row in range(count):
        for head in range(heads):
            seen = slice(start + row + 1)
            expected[row, head] = exact_attention(q[row, head], k[seen, head], v[seen, head], 0.5)
    assert_close(actual.double(), expected, FLOAT32_ERROR)


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("heads", "latents", "rope", "block"), [(1, 8, 2, 4), (3, 20, 6, 24), (16, 512, 64, 128)]
)
def test_absorbed_attention_is_softmax_attention_over_expanded_latents(
    module: object, heads: int, latents: int, rope: int, block: int
) -> None:
    lengths = torch.tensor([1, 300, 2 * block])
    cache = randn(1, 400 // block + 2, block, latents + rope)
    tables = torch.randint(0, len(cache), (3, 300 // block + 1), generator=torch.Generator().manual_seed(4))
    tables = torch.cat([tables, tables[:, :1]], dim=1)
    q, kv_b = randn(2, 3, heads, 24 + rope), randn(3, heads, 24 + 18, latents) / latents**0.5
    actual = module.absorbed_attention(q, kv_b, cache, tables, lengths, 0.05)  # type: ignore[attr-defined]
    for row, length in enumerate(lengths.tolist()):
        kv_c, k_pe = cache[tables[row]].flatten(0, 1)[:length].split([latents, rope], dim=1)
        for head in range(heads):
            k_nope, v = (kv_c.double() @ kv_b[head].double().T).split([24, 18], dim=1)
            keys = torch.cat([k_nope, k_pe.double()], dim=1)
            expected = exact_attention(q[row, head], keys, v, 0.05)
            assert_close(actual[row, head].double(), expected, FLOAT32_ERROR)


@FLOATS
def test_experts_are_the_plain_ones(dtype: torch.dtype, error: float) -> None:
    gate, up = randn(1, 4, 33, 48, dtype=dtype), randn(2, 4, 33, 48, dtype=dtype)
    down, rows = randn(3, 4, 48, 33, dtype=dtype), randn(4, 30, 48, dtype=dtype)
    counts = torch.tensor([0, 21, 1, 8])
    outputs = [
        kernels.experts(rows, None, counts, kernels.pack(gate, up, down))
        for kernels in (load_expert_kernels("cpu"), load_expert_kernels("reference"))
    ]
    assert_close(outputs[0], outputs[1], error)
