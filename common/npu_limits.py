"""What torch_npu's operators document that they take, as far as it decides which of them we call. Pure.

Every function returns None where an operator can be called, else the rest of the sentence "... cannot be
used, because". Sources: torch_npu 2.13.0's own documentation (torch_npu/_op_plugin_docs.py), and for the
operators of the exchange op-plugin's docs/zh/custom_APIs/torch_npu. Shapes: T tokens, E experts, K experts
per token, D hidden_size, F moe_intermediate_size, H heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import npu_windows
from common.npu_windows import WindowLayout

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
        n_routed_experts: of the checkpoint, and their replicas.
        most_tokens: tokens of the router in the largest step or micro-batch.
        dtype: the model's.
        most_local: most experts of one worker in any layer; None: dealt out evenly.
        buffer_mb: HCCL_BUFFSIZE, or CANN's default.
    """

    generation: str
    num_workers: int
    n_routed_experts: int
    num_experts_per_tok: int
    hidden_size: int
    most_tokens: int
    dtype: str = "bfloat16"
    most_local: int | None = None
    buffer_mb: int = 200

    @property
    def windows(self) -> WindowLayout:
        """The windows that npu_attention_to_ffn would write to, for as many tokens as it takes."""
        even = -(-self.n_routed_experts // max(self.num_workers, 1))
        return WindowLayout(
            max(min(self.most_tokens, npu_windows.MOST_TOKENS), 1),
            self.num_experts_per_tok,
            self.hidden_size,
            self.num_workers * (even if self.most_local is None else self.most_local),
        )


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
    """npu_attention_to_ffn and npu_ffn_to_attention: the router is the attention rank, workers are FFN ranks.

    Both take any step that is cut small enough: more tokens than they take go another way. Without the
    quantisation that the first one offers: it multiplies by 127 / max|x| where npu_dynamic_quant divides by
    max|x| / 127, and rows would not have the bits of ep_level 1.
    """
    size, windows = shape.num_workers + 1, shape.windows
    sizes, most_slots = npu_windows.HIDDEN_SIZES, npu_windows.MOST_SLOTS
    return _first(
        (shape.generation == "A3", f"it is for Atlas A3, not for {shape.generation}"),
        (size in npu_windows.GROUP_SIZES, f"a group of {size} ranks is not documented"),
        (
            shape.dtype in HALF_DTYPES,
            f"the dtype is {shape.dtype}, and must be one of {', '.join(HALF_DTYPES)}",
        ),
        (
            shape.hidden_size in sizes,
            f"hidden_size {shape.hidden_size} is not within {sizes[0]}..{sizes[-1]}",
        ),
        (windows.top_k <= most_slots, f"top-{windows.top_k} exceeds {most_slots}"),
        (
            windows.num_experts <= npu_windows.MOST_EXPERTS,
            f"{windows.num_experts} places for experts exceed {npu_windows.MOST_EXPERTS}",
        ),
        (
            windows.least_buffer_mb <= shape.buffer_mb,
            f"HCCL_BUFFSIZE is {shape.buffer_mb}, and must be at least {windows.least_buffer_mb}",
        ),
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


ATTENTION_TO_FFN = "npu_attention_to_ffn and npu_ffn_to_attention"
ALL_TO_ALL_V = "HcclAlltoAllV"


@dataclass(frozen=True, slots=True)
class ExchangeChoice:
    """How rows travel at ep_level 2 on NPUs, and why not otherwise.

    Attributes:
        operator: what runs.
        reasons: a sentence for each fused operator that does not.
        windows: what the operator writes to; None where it is no fused one.
    """

    operator: str
    reasons: tuple[str, ...]
    windows: WindowLayout | None = None

    @property
    def text(self) -> str:
        """What runs and why, for logs, status and preflight."""
        more = ""
        if self.windows is not None:
            more = f" for up to {self.windows.num_tokens} tokens at a time, and {ALL_TO_ALL_V} for others"
        return f"{self.operator}{more}; {'; '.join(self.reasons)}"

    def without_windows(self) -> ExchangeChoice:
        """What runs where a rank could not make its window."""
        why = "a rank could not make its window, and its log says more"
        reason = f"npu_attention_to_ffn cannot be used, because {why}"
        return ExchangeChoice(ALL_TO_ALL_V, (reason, *self.reasons))


def generation_of(device_name: str) -> str:
    """A2 or A3, or the device's own name where it is neither: what decides which operators there are."""
    if device_name.startswith("Ascend910B"):
        return "A2"
    return "A3" if device_name.startswith("Ascend910_93") else device_name


def choose_exchange(shape: ExchangeShape) -> ExchangeChoice:
    """Say which operator carries rows at ep_level 2, and why the other fused ones do not."""
    dispatch = f"npu_moe_distribute_dispatch_v2 cannot be used, because {distribute_dispatch(shape)}"
    dispatch += f" (it would take HCCL_BUFFSIZE={least_buffer_mb(shape)})"
    why_not = attention_to_ffn(shape)
    if why_not is None:
        return ExchangeChoice(ATTENTION_TO_FFN, (dispatch,), shape.windows)
    return ExchangeChoice(ALL_TO_ALL_V, (f"npu_attention_to_ffn cannot be used, because {why_not}", dispatch))
