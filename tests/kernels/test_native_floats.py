"""The native float kernels: close to the reference on every path, and with the same bits on all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common import native_floats, native_library
from common.native_floats import NativeFloats
from router.kernels import reference
from tests.kernels.comparing import assert_close, num_threads, randn

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason=str(native_library.why_unavailable())
)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(params=native_library.PATHS)
def kernels(request: pytest.FixtureRequest) -> NativeFloats:
    """The library on one of its paths."""
    if request.param not in native_library.available_paths():
        pytest.skip(f"this processor has no {request.param}")
    return native_floats.load(path=request.param)


def error_of(dtype: torch.dtype) -> float:
    """One rounding of the result, and what sums in another order differ by."""
    return 2.0**-7 if dtype == torch.bfloat16 else 2e-6


def assert_like_the_reference(
    kernels: NativeFloats,
    dtype: torch.dtype,
    compute: Callable[[NativeFloats], Tensor],
    expected: Tensor,
) -> None:
    """Compare a path with the reference in float32, and its bits with those of the best path."""
    output = compute(kernels)
    assert_close(output, expected.to(output.dtype), error_of(dtype))
    assert torch.equal(output, compute(native_floats.load()))


@FLOATS
@pytest.mark.parametrize("size", [1, 15, 16, 33, 2048])
def test_rms_norm(kernels: NativeFloats, size: int, dtype: torch.dtype) -> None:
    x, weight = randn(1, 9, size + 3, dtype=dtype)[:, 3:], randn(2, size, dtype=dtype)
    expected = reference.rms_norm(x, weight, 1e-6)
    assert_like_the_reference(kernels, dtype, lambda own: own.rms_norm(x, weight, 1e-6), expected)


@FLOATS
@pytest.mark.parametrize("size", [1, 15, 16, 33, 1408])
def test_swiglu_of_views(kernels: NativeFloats, size: int, dtype: torch.dtype) -> None:
    gate, up = (5 * randn(1, 9, 2 * size, dtype=dtype)).chunk(2, dim=1)
    expected = reference.swiglu(gate, up)
    assert_like_the_reference(kernels, dtype, lambda own: own.swiglu(gate, up), expected)


@FLOATS
@pytest.mark.parametrize("size", [1, 15, 33, 2048])
def test_an_update_is_added_to_the_residual_and_that_is_normalised(
    kernels: NativeFloats, size: int, dtype: torch.dtype
) -> None:
    residual, update, weight = randn(1, 9, size, dtype=dtype), randn(2, 9, size, dtype=dtype), randn(3, size)
    found, expected = residual.clone(), residual + update
    normed = kernels.add_rms_norm(found, update, weight.to(dtype), 1e-6)
    assert torch.equal(found, expected)
    assert torch.equal(normed, kernels.rms_norm(expected, weight.to(dtype), 1e-6))


@FLOATS
@pytest.mark.parametrize("size", [1, 15, 33, 2048])
def test_routed_rows_are_added_to_shared_ones_and_rounded_once(
    kernels: NativeFloats, size: int, dtype: torch.dtype
) -> None:
    shared, routed = randn(1, 9, size, dtype=dtype), randn(2, 9, size)
    expected = (shared.float() + routed).to(dtype)
    assert torch.equal(kernels.add_routed(shared, routed), expected)


@pytest.mark.parametrize("wrong", [(8, 16), (9, 8)], ids=str)
def test_nothing_is_added_in_place_that_does_not_fit(kernels: NativeFloats, wrong: tuple[int, int]) -> None:
    residual = randn(1, 9, 16)
    with pytest.raises(ValueError, match="in place: give one shape, without gaps"):
        kernels.add_rms_norm(residual, randn(2, *wrong), randn(3, 16), 1e-6)
    with pytest.raises(ValueError, match="in place: give one shape, without gaps"):
        kernels.add_routed(randn(1, 9, 32)[:, ::2], residual)


def placed(
    rotate_and_store: Callable[..., None],
    q: Tensor,
    latents: Tensor,
    norm: tuple[Tensor, Tensor | None],
    angles: Tensor,
) -> Tensor:
    """Return turned queries and what is in the cache, flat, one after the other."""
    q, cache = q.clone(), torch.zeros(3, 4, latents.shape[1], dtype=q.dtype)
    slots = torch.tensor([11, 0, 5, 7, 2])[: len(q)]
    rotate_and_store(q, latents, *norm, 1e-6, angles.cos(), angles.sin(), cache, slots)
    return torch.cat([q.flatten(), cache.flatten()])


@FLOATS
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    ("heads", "nope", "latents", "rope"), [(1, 1, 1, 2), (3, 5, 20, 6), (16, 128, 512, 64)]
)
def test_queries_and_keys_turn_and_latents_are_stored_where_the_slots_say(
    kernels: NativeFloats, heads: int, nope: int, latents: int, rope: int, has_bias: bool, dtype: torch.dtype
) -> None:
    q = randn(1, 5, heads, nope + rope, dtype=dtype)
    both = randn(2, 5, latents + rope + 3, dtype=dtype)[:, : latents + rope]
    norm = randn(3, latents, dtype=dtype), randn(4, latents, dtype=dtype) if has_bias else None
    angles = randn(5, 5, rope // 2)
    expected = placed(reference.rotate_and_store, q, both, norm, angles)
    assert_like_the_reference(
        kernels, dtype, lambda own: placed(own.rotate_and_store, q, both, norm, angles), expected
    )


@FLOATS
@pytest.mark.parametrize("rows", [1, 3, 21])
@pytest.mark.parametrize(("size", "experts"), [(1, 1), (24, 5), (33, 17), (2048, 64)])
def test_gate_logits(kernels: NativeFloats, size: int, experts: int, rows: int, dtype: torch.dtype) -> None:
    x, weight = randn(1, rows, size, dtype=dtype), randn(2, experts, size)
    output = kernels.gate_logits(x, weight)
    # Products of rows that are bfloat16 are exact too: only the order of the sum differs.
    assert_close(output, reference.gate_logits(x, weight), 2e-6)
    assert torch.equal(output, native_floats.load().gate_logits(x, weight))


@FLOATS
@pytest.mark.parametrize(("heads", "size", "out"), [(1, 1, 1), (2, 7, 33), (4, 16, 24), (16, 128, 512)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 19])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_per_head_linear_with_either_dimension_of_the_weight_first(
    kernels: NativeFloats,
    heads: int,
    size: int,
    out: int,
    rows: int,
    is_transposed: bool,
    dtype: torch.dtype,
) -> None:
    x = randn(1, rows, heads, size, dtype=dtype)
    weight = randn(2, heads, out, size, dtype=dtype)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expected = reference.per_head_linear(x.float(), weight.float())
    assert_like_the_reference(kernels, dtype, lambda own: own.per_head_linear(x, weight), expected)


def plainly_attended(
    q: Tensor, kv_b: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """The reference in float32, rounded where the model's dtype is: after each of the stages."""
    dtype = q.dtype
    num_nope = q.shape[2] - (cache.shape[2] - kv_b.shape[2])
    q_nope, q_pe = q[..., :num_nope].float(), q[..., num_nope:].float()
    w_k, w_v = kv_b[:, :num_nope].float(), kv_b[:, num_nope:].float()
    q_latent = reference.per_head_linear(q_nope, w_k.transpose(1, 2)).to(dtype).float()
    found = reference.decode_attention(q_latent, q_pe, cache.float(), tables, lengths, scale).to(dtype)
    return reference.per_head_linear(found.float(), w_v)


@FLOATS
@pytest.mark.parametrize("queries", [1, 2, 5, 8, 17])
@pytest.mark.parametrize(
    ("heads", "nope", "out", "latents", "rope", "block"),
    [(1, 3, 5, 20, 6, 4), (13, 16, 24, 64, 8, 16), (16, 128, 128, 512, 64, 128)],
)
def test_absorbed_attention_has_one_result_alone_in_company_and_with_any_threads(
    kernels: NativeFloats,
    heads: int,
    nope: int,
    out: int,
    latents: int,
    rope: int,
    block: int,
    queries: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(2)
    cache = randn(1, 40, block, latents + rope, dtype=dtype)
    tables = torch.randint(40, (queries, 3 + 33 // block), generator=generator)
    lengths = torch.tensor([33, 1, 31, 32, 3 * block]).repeat(4)[:queries]
    q = randn(3, queries, heads, nope + rope + 7, dtype=dtype)[..., 7:]
    kv_b = (randn(4, heads, nope + out, latents) / latents**0.5).to(dtype)

    def attend(own: NativeFloats) -> Tensor:
        return own.absorbed_attention(q, kv_b, cache, tables, lengths, 0.1)

    with num_threads(1):
        output = attend(kernels)
        # Two roundings lie between the stages: where one falls to the other side, results differ by it.
        error = 2.0**-6 if dtype == torch.bfloat16 else 4e-6
        assert_close(output, plainly_attended(q, kv_b, cache, tables, lengths, 0.1).to(dtype), error)
    with num_threads(2):
        assert torch.equal(output, attend(native_floats.load()))
    for row in {0, queries // 2, queries - 1}:
        one = slice(row, row + 1)
        alone = kernels.absorbed_attention(q[one], kv_b, cache, tables[one], lengths[one], 0.1)
        assert torch.equal(alone, output[one])


@FLOATS
@pytest.mark.parametrize(("heads", "size", "values"), [(1, 5, 3), (3, 24, 20), (16, 192, 128)])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 65), (63, 2), (100, 33)])
def test_prompt_attention(
    kernels: NativeFloats,
    heads: int,
    size: int,
    values: int,
    start: int,
    length: int,
    dtype: torch.dtype,
) -> None:
    q = randn(1, length, heads, size, dtype=dtype)
    k, v = (randn(seed, start + length, heads, part, dtype=dtype) for seed, part in ((2, size), (3, values)))
    expected = reference.prefill_attention(q.float(), k.float(), v.float(), start, 0.2, 16)
    assert_like_the_reference(kernels, dtype, lambda own: own.prompt_attention(q, k, v, start, 0.2), expected)


@FLOATS
@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=["rounded", "double"])
@pytest.mark.parametrize("size", [1, 40, 300])
def test_sums_over_slots_have_the_bits_of_the_loop_over_slots(
    kernels: NativeFloats, size: int, sums: torch.dtype, dtype: torch.dtype
) -> None:
    rows, weights = randn(1, 30, size, dtype=dtype), randn(2, 25, 3)
    position_of = torch.randint(36, (25, 3), generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(25, size, dtype=torch.float64)
    for token, position, weight in (
        (t, position_of[t, k], weights[t, k]) for t in range(25) for k in range(3)
    ):
        if position < 30:
            expected[token] += (rows[position].float() * weight).double()
    for parts in ([rows], rows.split([11, 0, 1, 18])):
        assert torch.equal(kernels.sum_slots(parts, position_of, weights, sums), expected.to(sums))


def test_tensors_of_other_dtypes_are_refused_before_their_memory_is_read(kernels: NativeFloats) -> None:
    x = randn(1, 3, 16)
    for wrong in (x.double(), x.half()):
        with pytest.raises(ValueError, match="cannot be computed together: give float32 or bfloat16 alone"):
            kernels.rms_norm(wrong, wrong[0], 1e-6)
    with pytest.raises(ValueError, match=r"tensors of torch.bfloat16, torch.float32 cannot be computed"):
        kernels.swiglu(x, x.bfloat16())
