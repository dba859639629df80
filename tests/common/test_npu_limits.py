"""What torch_npu documents decides what is called; every refusal is the rest of a sentence."""

from __future__ import annotations

import dataclasses

import pytest

from common import npu_limits
from common.npu_limits import ExchangeShape
from common.npu_windows import WindowLayout

R1 = ExchangeShape(
    generation="A3",
    num_workers=16,
    n_routed_experts=256,
    num_experts_per_tok=8,
    hidden_size=7168,
    most_tokens=64,
)


def test_the_published_models_are_within_the_limits_of_their_kernels() -> None:
    assert npu_limits.gating(256, 8, 4, 8) is None  # V3, R1
    assert npu_limits.gating(160, 8, 3, 6) is None  # V2
    assert npu_limits.gating(64, 1, 1, 6) is None  # V2-Lite
    for heads, hidden_size, inner in ((128, 7168, 2048), (128, 5120, 1536)):
        assert npu_limits.latent_attention("bfloat16", heads, 512, 64, 128) is None
        assert npu_limits.prompt_attention("bfloat16", heads, 192, 128, 32768) is None
        assert npu_limits.grouped_matmul(256, hidden_size, inner) is None
        assert npu_limits.grouped_int8(16, hidden_size, inner, "bfloat16") is None
        assert npu_limits.dequant_swiglu(inner) is None
    # 16 heads: prompts are within them, generated tokens are not.
    assert npu_limits.prompt_attention("bfloat16", 16, 192, 128, 4096) is None
    assert "16 heads" in str(npu_limits.latent_attention("bfloat16", 16, 512, 64, 128))


@pytest.mark.parametrize(
    ("why_not", "words"),
    [
        (npu_limits.gating(100, 8, 4, 8), "not 8 equal groups"),
        (npu_limits.gating(16, 8, 4, 4), "more than 2"),
        (npu_limits.gating(64, 8, 1, 9), "do not fit into 1 groups of 8"),
        (npu_limits.gating(4096, 1, 1, 8), "exceed 2048"),
        (npu_limits.latent_attention("float32", 128, 512, 64, 128), "the dtype is float32"),
        (npu_limits.latent_attention("bfloat16", 128, 512, 32, 128), "latents are 512 + 32"),
        (npu_limits.latent_attention("bfloat16", 128, 512, 64, 64), "blocks have 64 tokens"),
        (npu_limits.prompt_attention("bfloat16", 128, 192, 128, 65537), "65537 keys"),
        (npu_limits.grouped_matmul(1025, 64, 64), "1025 experts"),
        (npu_limits.grouped_matmul(8, 64, 32768), "an axis of 65536"),
        (npu_limits.grouped_int8(8, 64, 64, "float32"), "in float32"),
        (npu_limits.grouped_int8(8, 64, 5136, "bfloat16"), "10272 columns"),
        (npu_limits.grouped_int8(8, 40, 64, "bfloat16"), "fractals"),
        (npu_limits.dequant_swiglu(96), "no multiple of 64"),
        (npu_limits.dequant_swiglu(10560), "exceeds 10496"),
    ],
)
def test_a_refusal_has_the_number_and_the_rule(why_not: str | None, words: str) -> None:
    assert why_not is not None
    assert words in why_not


def changed(**changes: object) -> str:
    return str(npu_limits.distribute_dispatch(dataclasses.replace(R1, **changes)))  # type: ignore[arg-type]


def test_dispatch_and_combine_never_fit_a_group_whose_workers_bring_no_tokens() -> None:
    assert "bring no tokens" in changed()
    assert "no ranks for shared experts" in changed(generation="A2", num_workers=15)
    assert "not for Ascend310P" in changed(generation="Ascend310P")
    assert "a group of 769" in changed(num_workers=768, n_routed_experts=768)
    assert "dealt out evenly to 15" in changed(num_workers=15)
    assert "1025 experts exceed" in changed(num_workers=1, n_routed_experts=1025)
    assert "top-17" in changed(num_experts_per_tok=17)
    assert "hidden_size 512" in changed(hidden_size=512)
    assert "513 tokens" in changed(most_tokens=513)


@pytest.mark.parametrize(
    ("name", "generation"),
    [("Ascend910B3", "A2"), ("Ascend910_9391", "A3"), ("Ascend310P3", "Ascend310P3")],
)
def test_a_device_name_tells_the_generation(name: str, generation: str) -> None:
    assert npu_limits.generation_of(name) == generation


def test_the_choice_names_what_runs_and_why_each_fused_operator_does_not() -> None:
    choice = npu_limits.choose_exchange(R1)
    assert choice.operator == "npu_attention_to_ffn and npu_ffn_to_attention"
    assert choice.windows == WindowLayout(64, 8, 7168, 256)
    (dispatch,) = choice.reasons
    assert dispatch.startswith("npu_moe_distribute_dispatch_v2 cannot be used, because ")
    large = npu_limits.choose_exchange(dataclasses.replace(R1, most_tokens=8192))
    assert large.text.startswith(f"{choice.operator} for up to 512 tokens at a time, and HcclAlltoAllV for o")
    for other in (
        npu_limits.choose_exchange(dataclasses.replace(R1, generation="A2")),
        choice.without_windows(),
    ):
        assert (other.operator, other.windows) == ("HcclAlltoAllV", None)
        assert other.reasons[0].startswith("npu_attention_to_ffn cannot be used, because ")
        assert other.text == f"HcclAlltoAllV; {other.reasons[0]}; {other.reasons[1]}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation": "A2"}, "for Atlas A3, not for A2"),
        ({"num_workers": 768, "n_routed_experts": 768}, "a group of 769 ranks"),
        ({"num_workers": 0}, "a group of 1 ranks"),
        ({"dtype": "float32"}, "the dtype is float32"),
        ({"hidden_size": 1023}, "hidden_size 1023 is not within 1024..8064"),
        ({"hidden_size": 8192}, "hidden_size 8192"),
        ({"num_experts_per_tok": 17}, "top-17 exceeds 16"),
        ({"most_local": 65}, "1040 places for experts exceed 1024"),
        ({"n_routed_experts": 1025}, "1040 places for experts exceed 1024"),
        ({"most_tokens": 512, "buffer_mb": 57}, "HCCL_BUFFSIZE is 57, and must be at least 58"),
        ({"most_tokens": 8192, "buffer_mb": 57}, "HCCL_BUFFSIZE is 57, and must be at least 58"),
    ],
)
def test_windows_are_refused_outside_of_what_their_operators_document(
    changes: dict[str, object], words: str
) -> None:
    assert npu_limits.attention_to_ffn(R1) is None
    why = npu_limits.attention_to_ffn(dataclasses.replace(R1, **changes))  # type: ignore[arg-type]
    assert why is not None
    assert words in why


def test_windows_lie_as_documented() -> None:
    # op-plugin's example for npu_attention_to_ffn: 16 tokens of 8 + 1 slots, 7168 columns, 512 bytes aligned.
    layout = WindowLayout(16, 9, 7168, 9)
    assert layout.worker_table == [1, 1, 1 + 1 + 16 * 9]
    assert layout.worker_rows == [1, 1, 16, 9, 7168]
    assert layout.worker_rows_at == (4 * (2 + 16 * 9) + 511) // 512 * 512 == 1024
    assert layout.worker_bytes == 1024 + 2 * 16 * 9 * 7168
    # And for npu_ffn_to_attention: 8 tokens of 4 + 1 slots, 7168 + 128 columns.
    layout = WindowLayout(8, 5, 7168, 9)
    assert layout.router_flags == [1, 8, 5]
    assert layout.router_rows == [1, 8, 5, 7168 + 128]
    assert layout.router_rows_at == 512
    assert layout.router_bytes == 512 + 2 * 8 * 5 * 7296


def test_the_buffer_that_dispatch_needs_is_the_documented_figure() -> None:
    # 256 tokens, 16 ranks, R1 on A2: 900 MB. 64 tokens, 16 ranks, R1 on A3: about 478 MB.
    assert npu_limits.least_buffer_mb(dataclasses.replace(R1, generation="A2", most_tokens=256)) == 900
    assert 470 <= npu_limits.least_buffer_mb(R1) <= 490
