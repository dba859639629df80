"""What torch_npu's operators document that they take, as far as it decides which of them we call. Pure.

Every function returns None where an operator can be called, else the rest of the sentence "... cannot be
used, because". Sources: torch_npu 2.13.0's own documentation (torch_npu/_op_plugin_docs.py), and for the
operators of the exchange op-plugin's docs/zh/custom_APIs/torch_npu. Shapes: T tokens, E experts, K experts
per token, D hidden_size, F moe_intermediate_size, H heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_DTYPES = ("bfloat16", "float16")

MOST_SORTED_EXPERTS = 10240
"""npu_moe_init_routing_v2: expert_num."""
INNER_LIMIT = 65536
"""npu_grouped_matmul: the last axes of x and weight stay below."""
MOST_GROUPS = 1024
MOST_FUSED_COLUMNS = 10240
"""npu_grouped_matmul_swiglu_quant: N, which is 2F."""
DEQUANT_SWIGLU_MULTIPLE = 64
MOST_DEQUANT_SWIGLU = 10496
NZ_ROWS, NZ_COLUMNS = 16, 32
"""An int8 matrix lies in FRACTAL_NZ in fractals of this size."""
MOST_QUANT_COLUMNS = 65535

LATENT_SIZE, ROTARY_SIZE = 512, 64
LATENT_HEADS = (32, 64, 128)
LATENT_BLOCKS = (16, 128)
PROMPT_HEADS = (8, 16, 32, 64, 128)
PROMPT_SIZE, PROMPT_VALUE_SIZES = 192, (128, 192)
MOST_PROMPT_TOKENS = 65536


def _first(*checks: tuple[bool, str]) -> str | None:
    return next((sentence for holds, sentence in checks if not holds), None)


def gating(num_experts: int, num_groups: int, num_kept_groups: int, top_k: int) -> str | None:
    """npu_moe_gating_top_k."""
    if num_groups < 1 or num_experts % num_groups:
        return f"{num_experts} experts are not {num_groups} equal groups"
    size = num_experts // num_groups
    aligned = -(-size // 32) * 32 * num_groups
    return _first(
        (size > 2, f"a group has {size} experts, and must have more than 2"),
        (max(num_experts, aligned) <= 2048, f"{num_experts} experts in groups of 32 exceed 2048"),
        (
            top_k <= size * num_kept_groups,
            f"{top_k} experts do not fit into {num_kept_groups} groups of {size}",
        ),
    )


def grouped_matmul(num_experts: int, hidden_size: int, intermediate_size: int) -> str | None:
    """npu_grouped_matmul, one tensor for all experts' weights."""
    widest = max(hidden_size, 2 * intermediate_size)
    return _first(
        (1 <= num_experts <= MOST_GROUPS, f"a worker holds {num_experts} experts, at most {MOST_GROUPS} go"),
        (widest < INNER_LIMIT, f"a matrix has an axis of {widest}, and must stay below {INNER_LIMIT}"),
    )


def grouped_int8(num_experts: int, hidden_size: int, intermediate_size: int, dtype: str) -> str | None:
    """npu_grouped_matmul_swiglu_quant, and npu_grouped_matmul in int8 with results in `dtype`."""
    return _first(
        (dtype == "bfloat16", f"results would be in {dtype}, and are documented in bfloat16"),
        (2 * intermediate_size <= MOST_FUSED_COLUMNS, f"gate and up have {2 * intermediate_size} columns"),
        (
            hidden_size % NZ_ROWS == 0 and 2 * intermediate_size % NZ_COLUMNS == 0,
            f"[{hidden_size}, {2 * intermediate_size}] is not made of fractals [{NZ_ROWS}, {NZ_COLUMNS}]",
        ),
    ) or grouped_matmul(num_experts, hidden_size, intermediate_size)


def dequant_swiglu(intermediate_size: int) -> str | None:
    """npu_dequant_swiglu_quant with one scale per expert."""
    return _first(
        (
            intermediate_size % DEQUANT_SWIGLU_MULTIPLE == 0,
            f"moe_intermediate_size {intermediate_size} is no multiple of {DEQUANT_SWIGLU_MULTIPLE}",
        ),
        (
            intermediate_size <= MOST_DEQUANT_SWIGLU,
            f"moe_intermediate_size {intermediate_size} exceeds {MOST_DEQUANT_SWIGLU}",
        ),
    )


def latent_attention(
    dtype: str, heads: int, latent_size: int, rotary_size: int, block_size: int
) -> str | None:
    """npu_fused_infer_attention_score over pages of latents: one query token per sequence."""
    return _first(
        (dtype in HALF_DTYPES, f"the dtype is {dtype}, and must be one of {', '.join(HALF_DTYPES)}"),
        (heads in LATENT_HEADS, f"there are {heads} heads, and must be one of {LATENT_HEADS}"),
        (
            (latent_size, rotary_size) == (LATENT_SIZE, ROTARY_SIZE),
            f"latents are {latent_size} + {rotary_size}, and must be {LATENT_SIZE} + {ROTARY_SIZE}",
        ),
        (
            block_size in LATENT_BLOCKS,
            f"blocks have {block_size} tokens, and must have one of {LATENT_BLOCKS}",
        ),
    )


def prompt_attention(dtype: str, heads: int, key_size: int, value_size: int, num_keys: int) -> str | None:
    """npu_fused_infer_attention_score over the expanded keys of one prompt (TND)."""
    return _first(
        (dtype == "bfloat16", f"the dtype is {dtype}, and must be bfloat16"),
        (heads in PROMPT_HEADS, f"there are {heads} heads, and must be one of {PROMPT_HEADS}"),
        (
            key_size == PROMPT_SIZE and value_size in PROMPT_VALUE_SIZES,
            f"keys and values are {key_size} and {value_size} wide, and must be {PROMPT_SIZE} and one of "
            f"{PROMPT_VALUE_SIZES}",
        ),
        (num_keys <= MOST_PROMPT_TOKENS, f"{num_keys} keys exceed {MOST_PROMPT_TOKENS}"),
    )


# ------------------------------------------------------------------------------------------------ the
# exchange


@dataclass(frozen=True, slots=True)
class ExchangeShape:
    """What decides whether one of the vendor's fused operators could carry an exchange.

    Attributes:
        generation: of the devices, "A2" or "A3".
        num_workers: expert workers of the group; the router is one rank more.
        most_tokens: tokens of the router in the largest step or micro-batch.
    """

    generation: str
    num_workers: int
    n_routed_experts: int
    num_experts_per_tok: int
    hidden_size: int
    most_tokens: int


A2_GROUPS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
A3_GROUPS = range(2, 769)
DISPATCH_EXPERTS = 1024
DISPATCH_TOP_K = 16
A3_LOCAL_EXPERTS = 2048
A2_TOKENS, A3_TOKENS = 256, 512
A2_HIDDEN, A3_HIDDEN = (32, 7168), (1024, 8192)


def distribute_dispatch(shape: ExchangeShape) -> str | None:
    """npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 over [router | workers].

    All ranks of their group but those for shared experts hold routed experts and bring tokens. The router
    holds none: it could only be a rank for shared experts, which exist on A3 alone, and workers bring no
    tokens.
    """
    if shape.generation not in ("A2", "A3"):
        return f"it is documented for A2 and A3, not for {shape.generation}"
    is_a3 = shape.generation == "A3"
    size = shape.num_workers + 1
    least, most = A3_HIDDEN if is_a3 else A2_HIDDEN
    most_tokens = A3_TOKENS if is_a3 else A2_TOKENS
    local = shape.n_routed_experts // max(shape.num_workers, 1)
    return _first(
        (is_a3, "the router holds no routed experts, and A2 has no ranks for shared experts only"),
        (size in (A3_GROUPS if is_a3 else A2_GROUPS), f"a group of {size} ranks is not documented"),
        (
            shape.n_routed_experts % max(shape.num_workers, 1) == 0,
            f"{shape.n_routed_experts} experts cannot be dealt out evenly to {shape.num_workers} ranks",
        ),
        (
            shape.n_routed_experts <= DISPATCH_EXPERTS,
            f"{shape.n_routed_experts} experts exceed {DISPATCH_EXPERTS}",
        ),
        (
            shape.num_experts_per_tok <= DISPATCH_TOP_K,
            f"top-{shape.num_experts_per_tok} exceeds {DISPATCH_TOP_K}",
        ),
        (
            local * size <= A3_LOCAL_EXPERTS,
            f"{local} experts on each of {size} ranks exceed {A3_LOCAL_EXPERTS} together",
        ),
        (
            least <= shape.hidden_size <= most,
            f"hidden_size {shape.hidden_size} is not within {least}..{most}",
        ),
        (
            shape.most_tokens <= most_tokens,
            f"a step may bring {shape.most_tokens} tokens to a rank, at most {most_tokens} go",
        ),
        (False, "expert workers bring no tokens of their own, and every rank must bring one at least"),
    )


def attention_to_ffn(shape: ExchangeShape) -> str | None:
    """npu_attention_to_ffn and npu_ffn_to_attention: attention ranks and FFN ranks, the router's own shape.

    Their limits are not in the package's documentation; what is known is the product they are for.
    """
    return _first(
        (shape.generation == "A3", f"it is for Atlas A3, not for {shape.generation}"),
        (shape.num_workers >= 1, "there is no FFN rank"),
    )


def least_buffer_mb(shape: ExchangeShape) -> int:
    """HCCL_BUFFSIZE in MB that npu_moe_distribute_dispatch_v2 needs for the group, by its documented
    formulas.

    Full mesh. A2: 2 * (BS * ep * min(E_local, K) * 2D + 2 MB). A3: 2 * (E_local * BS * ep *
    align512(align32(2D) + 64) + K * BS * align512(2D)).
    """
    ep = shape.num_workers
    local = -(-shape.n_routed_experts // max(ep, 1))
    row = 2 * shape.hidden_size
    if shape.generation == "A2":
        rows = shape.most_tokens * ep * min(local, shape.num_experts_per_tok)
        num_bytes = 2 * (rows * row + 2 * MEGABYTE)
    else:
        received = local * shape.most_tokens * ep * _align(_align(row, 32) + 64, 512)
        num_bytes = 2 * (received + shape.num_experts_per_tok * shape.most_tokens * _align(row, 512))
    return -(-num_bytes // MEGABYTE)


MEGABYTE = 1 << 20


def _align(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ExchangeChoice:
    """How rows travel at ep_level 2 on NPUs, and why not otherwise.

    Attributes:
        operator: what runs.
        reasons: a sentence for each fused operator that does not.
    """

    operator: str
    reasons: tuple[str, ...]


def generation_of(device_name: str) -> str:
    """A2 or A3, or the device's own name where it is neither: what decides which operators there are."""
    if device_name.startswith("Ascend910B"):
        return "A2"
    return "A3" if device_name.startswith("Ascend910_93") else device_name


def choose_exchange(shape: ExchangeShape) -> ExchangeChoice:
    """Say which operator carries rows at ep_level 2, and why none of the fused ones does."""
    reasons = []
    for name, why_not in (
        ("npu_attention_to_ffn", attention_to_ffn(shape)),
        ("npu_moe_distribute_dispatch_v2", distribute_dispatch(shape)),
    ):
        why = why_not or "it is not built in this version"
        reasons.append(f"{name} cannot be used, because {why}")
    reasons[-1] += f" (it would take HCCL_BUFFSIZE={least_buffer_mb(shape)})"
    return ExchangeChoice("HcclAlltoAllV", tuple(reasons))
