"""Every operation of an NPU's kernel modules against the reference, within the rounding of its dtype."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch_npu
from torch import Tensor

import expert_worker.kernels.npu as expert_npu
import expert_worker.kernels.reference as expert_reference
import router.kernels.npu as router_npu
import router.kernels.reference as router_reference
from common.exchange.routing import expand_rows
from common.model_config import ModelConfig
from common.quantization.w8a8 import Int8Weight, quantize_channels
from expert_worker.kernels import ExpertKernels, PackedInt8Experts
from router.kernels import RouterKernels
from tests.kernels.comparing import assert_close, randn
from tests.tiny_checkpoint import COMMON, FAMILIES

ROUTER: RouterKernels = router_npu
EXPERTS: ExpertKernels = expert_npu
NPU = torch.device("npu")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Relative to the largest value of a result; a bfloat16 has 8 bits, and two operations round it."""


def called(log: Path) -> list[str]:
    """Operators of CANN that were called, in order."""
    return [line for line in log.read_text().splitlines() if not line.endswith("GetWorkspaceSize")]


def compare(on_npu: Tensor, expected: Tensor, error: float | None = None) -> None:
    assert on_npu.device.type == "npu"
    assert_close(on_npu.cpu(), expected, ROUNDING[expected.dtype] if error is None else error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_normalised_activated_and_rotated_as_by_the_reference(
    dtype: torch.dtype, calls: Path
) -> None:
    x, weight = randn(1, 17, 96, dtype=dtype), (1 + 0.1 * randn(2, 96)).to(dtype)
    compare(
        ROUTER.rms_norm(x.to("npu"), weight.to("npu"), 1e-6),
        router_reference.rms_norm(x, weight, 1e-6),
        2 * ROUNDING[dtype],
    )
    gate, up = randn(3, 17, 96, dtype=dtype), randn(4, 17, 96, dtype=dtype)
    compare(ROUTER.swiglu(gate.to("npu"), up.to("npu")), router_reference.swiglu(gate, up))
    heads, angles = randn(5, 17, 3, 64, dtype=dtype), torch.arange(17 * 32).view(17, 32) * 0.37
    expected = router_reference.rotate(heads, angles.cos(), angles.sin())
    compare(router_npu.rotate(heads.to("npu"), angles.cos().to("npu"), angles.sin().to("npu")), expected)
    assert called(calls) == ["aclnnRmsNorm", "aclnnSwiGlu", "aclnnRotaryPositionEmbeddingV2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rows_are_those_of_the_reference(dtype: torch.dtype) -> None:
    x, weight, bias = randn(1, 9, 64, dtype=dtype), randn(2, 48, 64, dtype=dtype), randn(3, 48, dtype=dtype)
    compare(
        ROUTER.linear(x.to("npu"), weight.to("npu"), bias.to("npu")),
        router_reference.linear(x, weight, bias),
        2 * ROUNDING[dtype],
    )


def test_int8_products_have_the_bits_of_the_reference(calls: Path) -> None:
    x, weight = randn(1, 9, 64, dtype=torch.bfloat16), quantize_channels(randn(2, 48, 64))
    bias = torch.arange(48, dtype=torch.int32)
    rows, scales = ROUTER.quantize_rows(x.to("npu"))
    expected_rows, expected_scales = router_reference.quantize_rows(x)
    assert torch.equal(rows.cpu(), expected_rows)
    assert torch.equal(scales.cpu(), expected_scales)
    static = ROUTER.quantize_rows_static(x.to("npu"), 0.04, -3.0)
    assert torch.equal(static.cpu(), router_reference.quantize_rows_static(x, 0.04, -3.0))
    for own_bias, own_scales in itertools.product((None, bias), (None, expected_scales)):
        packed = ROUTER.pack_int8(
            weight.weight.to("npu"), weight.scale.to("npu"), None if own_bias is None else own_bias.to("npu")
        )
        plain = router_reference.pack_int8(weight.weight, weight.scale, own_bias)
        found = ROUTER.int8_linear(rows, None if own_scales is None else scales, packed)
        assert torch.equal(found.cpu(), router_reference.int8_linear(expected_rows, own_scales, plain))
    assert {"aclnnDynamicQuantV2", "aclnnQuantMatmulV5"} <= set(called(calls))


def test_float32_rows_are_quantised_although_the_operator_takes_none(calls: Path) -> None:
    x = randn(1, 5, 64)
    rows, scales = ROUTER.quantize_rows(x.to("npu"))
    expected = router_reference.quantize_rows(x)
    assert torch.equal(rows.cpu(), expected[0])
    assert torch.equal(scales.cpu(), expected[1])
    assert called(calls) == []


GATES = [
    ("v2", "softmax", "greedy", False, True),
    ("v2", "softmax", "group_limited_greedy", False, True),
    ("v3", "sigmoid", "noaux_tc", True, True),
    ("v2", "softmax", "greedy", True, False),
    ("v3", "sigmoid", "noaux_tc", False, False),
]


@pytest.mark.parametrize(("family", "scoring", "method", "normalized", "is_fused"), GATES)
def test_experts_are_chosen_and_weighed_as_by_the_reference(
    family: str, scoring: str, method: str, normalized: bool, is_fused: bool, tmp_path: Path, calls: Path
) -> None:
    overrides = {
        "scoring_func": scoring,
        "topk_method": method,
        "norm_topk_prob": normalized,
        "routed_scaling_factor": 2.5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(COMMON | FAMILIES[family] | overrides))
    config = ModelConfig.from_directory(tmp_path)
    logits, bias = randn(1, 33, 64), 0.1 * randn(2, 64)
    own_bias = bias if method == "noaux_tc" else None
    expected_ids, expected_weights = router_reference.choose_experts(logits, own_bias, config)
    ids, weights = ROUTER.choose_experts(
        logits.to("npu"), None if own_bias is None else bias.to("npu"), config
    )
    assert ids.dtype == torch.int64
    assert torch.equal(ids.cpu(), expected_ids)
    compare(weights, expected_weights)
    assert ("aclnnMoeGatingTopK" in called(calls)) == is_fused


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_grow_and_latents_reach_the_cache_as_by_the_reference(dtype: torch.dtype) -> None:
    residual, update = randn(1, 17, 96, dtype=dtype), randn(2, 17, 96, dtype=dtype)
    weight, on_npu = (1 + 0.1 * randn(3, 96)).to(dtype), residual.to("npu")
    normed = ROUTER.add_rms_norm(on_npu, update.to("npu"), weight.to("npu"), 1e-6)
    compare(normed, router_reference.add_rms_norm(residual, update, weight, 1e-6), 2 * ROUNDING[dtype])
    compare(on_npu, residual)
    routed = randn(4, 17, 96)
    compare(ROUTER.add_routed(on_npu, routed.to("npu")), router_reference.add_routed(residual, routed))

    q, latents, angles = randn(5, 7, 3, 40, dtype=dtype), randn(6, 7, 64, dtype=dtype), randn(7, 7, 8)
    norm = (1 + 0.1 * randn(8, 48)).to(dtype), randn(9, 48, dtype=dtype)
    cache, slots = torch.zeros(2, 16, 64, dtype=dtype), torch.tensor([3, 31, 0, 8, 9, 30, 17])
    given = q, latents, *norm, angles.cos(), angles.sin(), cache, slots
    q_on_npu, latents_on_npu, *others = (tensor.to("npu") for tensor in given)
    cos, sin, cache_on_npu, slots_on_npu = others[2:]
    ROUTER.rotate_and_store(
        *(q_on_npu, latents_on_npu, others[0], others[1], 1e-6),
        *(cos, sin, cache_on_npu, slots_on_npu),
    )
    router_reference.rotate_and_store(q, latents, *norm, 1e-6, *given[4:])
    compare(q_on_npu, q)
    compare(cache_on_npu, cache, 2 * ROUNDING[dtype])


@pytest.mark.parametrize(
    ("dtype", "heads", "latents", "rotary", "is_fused"),
    [
        (torch.bfloat16, 32, 512, 64, True),
        (torch.float32, 32, 512, 64, False),
        (torch.bfloat16, 4, 512, 64, False),
        (torch.bfloat16, 32, 48, 16, False),
    ],
)
def test_queries_see_the_latents_of_their_own_sequence(
    dtype: torch.dtype, heads: int, latents: int, rotary: int, is_fused: bool, calls: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    kv_c, k_pe = randn(1, 300, latents, dtype=dtype), randn(2, 300, rotary, dtype=dtype)
    slots = torch.randperm(5 * 128, generator=generator)[:300]
    plain = torch.zeros(5, 128, latents + rotary, dtype=dtype)
    cache = plain.to("npu")
    router_reference.store_latents(plain, slots, kv_c, k_pe)
    router_npu.store_latents(cache, slots.to("npu"), kv_c.to("npu"), k_pe.to("npu"))
    table = torch.tensor([3, 0, 4])
    found = ROUTER.gather_latents(cache, table.to("npu"), 270)
    assert torch.equal(found.cpu(), router_reference.gather_latents(plain, table, 270))
    q = randn(3, 3, heads, 32 + rotary, dtype=dtype)
    kv_b = (randn(4, heads, 32 + 24, latents) / latents**0.5).to(dtype)
    tables, lengths = torch.tensor([[3, 0, 4], [1, 0, 0], [4, 3, 0]]), torch.tensor([270, 1, 256])
    expected = router_reference.absorbed_attention(q, kv_b, plain, tables, lengths, 0.05)
    attended = ROUTER.absorbed_attention(q.to("npu"), kv_b.to("npu"), cache, tables.to("npu"), lengths, 0.05)
    # What lies between the stages is rounded too.
    compare(attended, expected, 2 * ROUNDING[dtype])
    assert any("FusedInferAttention" in name for name in called(calls)) == is_fused


@pytest.mark.parametrize(
    ("dtype", "heads", "size", "is_fused"),
    [(torch.bfloat16, 8, 192, True), (torch.float32, 8, 192, False), (torch.bfloat16, 3, 96, False)],
)
@pytest.mark.parametrize("start", [0, 5])
def test_a_prompt_sees_itself_and_what_came_before(
    dtype: torch.dtype, heads: int, size: int, is_fused: bool, start: int, calls: Path
) -> None:
    q = randn(1, 11, heads, size, dtype=dtype)
    k, v = randn(2, start + 11, heads, size, dtype=dtype), randn(3, start + 11, heads, 128, dtype=dtype)
    expected = router_reference.prefill_attention(q, k, v, start, 0.07, 128)
    compare(ROUTER.prefill_attention(q.to("npu"), k.to("npu"), v.to("npu"), start, 0.07, 128), expected)
    assert any("FusedInferAttention" in name for name in called(calls)) == is_fused


COUNTS = ((3, 0, 5, 1), (0, 0, 0, 0), (0, 0, 0, 7))


def weights_of(seed: int, dtype: torch.dtype, hidden: int = 64, inner: int = 64) -> list[list[Tensor]]:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [
        [0.2 * randn(seed + 10 * kind + expert, *shape, dtype=dtype) for expert in range(4)]
        for kind, shape in enumerate(shapes)
    ]


def int8_parts(eights: list[list[Int8Weight]]) -> list[PackedInt8Experts]:
    """Every expert on the NPU, as a worker reads them."""
    return [
        EXPERTS.pack_int8([gate.to(NPU)], [up.to(NPU)], [down.to(NPU)], torch.bfloat16)
        for gate, up, down in zip(*eights, strict=True)
    ]


def int8_reference_layer(eights: list[list[Int8Weight]]) -> PackedInt8Experts:
    gate, up, down = eights
    return expert_reference.pack_int8(gate, up, down, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_a_layer_of_experts_is_two_grouped_products(
    dtype: torch.dtype, counts: tuple[int, ...], calls: Path
) -> None:
    parts = weights_of(1, dtype)
    ticks: list[int] = []
    rows, tokens = randn(2, sum(counts), 64, dtype=dtype), torch.tensor(counts)
    packed = EXPERTS.join(
        [EXPERTS.pack(*([one.to("npu")] for one in own)) for own in zip(*parts, strict=True)]
    )
    found = EXPERTS.experts(rows.to("npu"), None, tokens, packed, lambda: ticks.append(1))
    expected = expert_reference.experts(rows, None, tokens, expert_reference.pack(*parts))
    if len(rows):
        compare(found, expected)
    assert found.shape == expected.shape
    assert len(ticks) == (1 if len(rows) else 0)  # one call has run them all
    assert called(calls).count("aclnnGroupedMatmulV5") == (2 if len(rows) else 0)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("is_quantised", [False, True])
def test_int8_experts_run_fused_or_in_parts_with_the_bits_of_each_other(
    counts: tuple[int, ...], is_grouped: bool, is_quantised: bool, calls: Path
) -> None:
    eights = [[quantize_channels(one) for one in own] for own in weights_of(1, torch.float32)]
    rows, tokens = randn(2, sum(counts), 64, dtype=torch.bfloat16), torch.tensor(counts)
    singles = int8_parts(eights)
    packed = EXPERTS.join_int8(singles)
    quantised = router_reference.quantize_rows(rows) if is_quantised and len(rows) else None
    sent, scales = (
        (rows.to("npu"), None) if quantised is None else (quantised[0].to("npu"), quantised[1].to("npu"))
    )
    found = EXPERTS.int8_experts(sent, scales, tokens, packed, None, is_grouped)
    expected = expert_reference.int8_experts(rows, None, tokens, int8_reference_layer(eights))
    assert found.shape == expected.shape
    if not len(rows):
        return
    compare(found, expected)
    other = EXPERTS.int8_experts(sent, scales, tokens, packed, None, not is_grouped)
    assert torch.equal(found.cpu(), other.cpu())
    assert "aclnnGroupedMatmulSwigluQuantWeightNZ" in called(calls)


def test_experts_that_are_joined_again_are_not_copied_and_others_are(calls: Path) -> None:
    eights = [[quantize_channels(one) for one in own] for own in weights_of(1, torch.float32)]
    singles = int8_parts(eights)
    packed = EXPERTS.join_int8(singles)
    assert EXPERTS.is_fused(packed)
    again = EXPERTS.join_int8(list(packed.each()))
    assert again.gate_up[0].parts[0] is packed.gate_up[0].parts[0]
    fewer = EXPERTS.join_int8(list(packed.each())[2:] + singles[:1])
    rows, tokens = randn(2, 6, 64, dtype=torch.bfloat16), torch.tensor([1, 2, 3])
    order = [2, 3, 0]
    plain = int8_reference_layer([[own[expert] for expert in order] for own in eights])
    compare(
        EXPERTS.int8_experts(rows.to("npu"), None, tokens, fewer),
        expert_reference.int8_experts(rows, None, tokens, plain),
    )
    floats = EXPERTS.join(
        [
            EXPERTS.pack(*([one.to("npu")] for one in own))
            for own in zip(*weights_of(1, torch.bfloat16), strict=True)
        ]
    )
    same = EXPERTS.join(list(floats.each()))
    assert same.down[3].data_ptr() == floats.down[3].data_ptr()
    part = EXPERTS.join(list(floats.each())[1:3])
    assert part.down[0].data_ptr() == floats.down[1].data_ptr()


def test_int8_experts_outside_of_the_limits_are_computed_by_the_reference(calls: Path) -> None:
    eights = [[quantize_channels(one) for one in own] for own in weights_of(1, torch.float32, 40, 24)]
    rows, tokens = randn(2, 5, 40, dtype=torch.bfloat16), torch.tensor([1, 0, 2, 2])
    packed = EXPERTS.join_int8(int8_parts(eights))
    expected = expert_reference.int8_experts(rows, None, tokens, int8_reference_layer(eights))
    assert torch.equal(EXPERTS.int8_experts(rows.to("npu"), None, tokens, packed).cpu(), expected)
    assert not any("GroupedMatmul" in name for name in called(calls))
    assert not EXPERTS.is_fused(packed)


@pytest.mark.parametrize(("first_key", "num_local"), [(0, 5), (5, 5), (15, 3), (5, 0)])
def test_a_worker_picks_the_rows_of_its_own_experts(first_key: int, num_local: int, calls: Path) -> None:
    hidden = randn(1, 12, 32, dtype=torch.bfloat16)
    keys = torch.stack(
        [torch.randperm(20, generator=torch.Generator().manual_seed(i))[:4] for i in range(12)]
    )
    weights = randn(2, 12, 4).abs()
    expected = expand_rows(hidden, keys, weights, first_key, num_local)
    found = EXPERTS.expand_rows(hidden.to("npu"), keys, weights, first_key, num_local)
    assert found.rows.device.type == "npu"
    assert torch.equal(found.rows.cpu(), expected.rows)
    assert torch.equal(found.tokens_per_expert, expected.tokens_per_expert)
    assert torch.equal(found.position_of, expected.position_of)
    assert torch.equal(found.weights, expected.weights)
    assert ("aclnnMoeInitRoutingV3" in called(calls)) == (num_local > 0)


def test_weights_for_the_fused_product_lie_in_fractals() -> None:
    eights = [[quantize_channels(one) for one in own] for own in weights_of(1, torch.float32)]
    packed = EXPERTS.join_int8(int8_parts(eights))
    assert torch_npu.get_npu_format(packed.gate_up[0].parts[0]) == expert_npu.FRACTAL_NZ
