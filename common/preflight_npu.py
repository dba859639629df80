"""The limits of Ascend's fused operators, and the HCCL buffer that dispatch and combine need. Pure.

From the documents of torch_npu (op-plugin) and CANN. Sizes in MB are 1024 * 1024 bytes, as HCCL counts them.
Shapes: E routed experts, K experts per token, D hidden_size, F moe_intermediate_size, BS tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from common.preflight import MEBIBYTE, Finding

Generation = Literal["A2", "A3"]

DEFAULT_BUFFER_MB = 200
"""CANN's, where HCCL_BUFFSIZE is not set."""
BYTES_16_BIT = 2
"""Rows travel in 16 bits, or in fewer; the formulas count 16."""


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The group that an operator runs in.

    Attributes:
        n_routed_experts, num_experts_per_tok, hidden_size, moe_intermediate_size: E, K, D, F of the model.
        num_groups: groups that the gate chooses experts from.
        ep_size: ranks that hold experts.
        most_tokens: BS, most tokens of one rank in one call.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    num_groups: int
    ep_size: int
    most_tokens: int

    @property
    def num_local_experts(self) -> int:
        """Experts of the rank that holds most of them."""
        return -(-self.n_routed_experts // self.ep_size)


@dataclass(frozen=True, slots=True)
class _DispatchLimits:
    """Of npu_moe_distribute_dispatch and _combine, without a hierarchy."""

    ep_sizes: frozenset[int]
    ep_words: str
    most_tokens: int
    hidden_sizes: range
    most_slots: int | None = None


DISPATCH: dict[Generation, _DispatchLimits] = {
    "A2": _DispatchLimits(
        frozenset({*range(2, 9), 16, 32, 64, 128, 256}), "2 to 8, 16, 32, 64, 128 or 256", 256, range(1, 7169)
    ),
    "A3": _DispatchLimits(frozenset(range(2, 769)), "2 to 768", 512, range(1024, 8193), 2048),
}
MOST_DISPATCH_EXPERTS = 1024
MOST_DISPATCH_CHOICES = 16
HIDDEN_STEP = 32
MOST_GATED_EXPERTS = 2048
MOST_GROUPED_EXPERTS = 1024
MOST_SWIGLU_COLUMNS = 10240
SWIGLU_ROWS_BELOW = 65536


def kernel_findings(group: ExpertGroup) -> Iterator[Finding]:
    """Compare a model with the limits of gating, grouped matmul, and grouped matmul with SwiGLU."""
    yield _at_most(
        "n_routed_experts of npu_moe_gating_top_k", group.n_routed_experts, MOST_GATED_EXPERTS, "use a CPU"
    )
    per_group = group.n_routed_experts // group.num_groups
    yield Finding(
        what="the number of experts per group of npu_moe_gating_top_k",
        needed="more than 2",
        found=str(per_group),
        is_met=per_group > 2,
        remedy="this model cannot be gated by the operator: use a CPU",
    )
    yield _at_most(
        "the number of experts per worker of npu_grouped_matmul",
        group.num_local_experts,
        MOST_GROUPED_EXPERTS,
        "use more expert workers",
    )
    yield _at_most(
        "2 * moe_intermediate_size of npu_grouped_matmul_swiglu_quant",
        2 * group.moe_intermediate_size,
        MOST_SWIGLU_COLUMNS,
        "set ExpertMesh.groupedMatmul to off",
    )
    yield _at_most(
        "hidden_size of npu_grouped_matmul_swiglu_quant",
        group.hidden_size,
        SWIGLU_ROWS_BELOW - 1,
        "set ExpertMesh.groupedMatmul to off",
    )


def dispatch_findings(group: ExpertGroup, generation: Generation, buffer_mb: int | None) -> Iterator[Finding]:
    """Compare a group with the limits of npu_moe_distribute_dispatch and _combine, the HCCL buffer included.

    Args:
        group: the ranks that dispatch and combine; every one of them holds experts.
        generation: of the NPUs: Atlas A2 or A3.
        buffer_mb: HCCL_BUFFSIZE; None: not set, CANN's default.
    """
    limits, operator = DISPATCH[generation], f"npu_moe_distribute_dispatch on {generation}"
    level_1 = "or set ep_level to 1"
    yield Finding(
        what=f"moe_ep of {operator}",
        needed=f"{limits.ep_words}, and a divisor of n_routed_experts ({group.n_routed_experts}),",
        found=str(group.ep_size),
        is_met=group.ep_size in limits.ep_sizes and group.n_routed_experts % group.ep_size == 0,
        remedy=f"choose another moe_ep, {level_1}",
    )
    yield _at_most(
        f"n_routed_experts of {operator}", group.n_routed_experts, MOST_DISPATCH_EXPERTS, "set ep_level to 1"
    )
    yield _at_most(
        f"num_experts_per_tok of {operator}",
        group.num_experts_per_tok,
        MOST_DISPATCH_CHOICES,
        "set ep_level to 1",
    )
    if limits.most_slots is not None:
        slots = group.num_local_experts * group.ep_size
        yield _at_most(
            f"experts per worker * moe_ep of {operator}", slots, limits.most_slots, "set ep_level to 1"
        )
    low, high = limits.hidden_sizes[0], limits.hidden_sizes[-1]
    yield Finding(
        what=f"hidden_size of {operator}",
        needed=f"a multiple of {HIDDEN_STEP} from {low} to {high}",
        found=str(group.hidden_size),
        is_met=group.hidden_size in limits.hidden_sizes and group.hidden_size % HIDDEN_STEP == 0,
        remedy="set ep_level to 1",
    )
    yield _at_most(
        f"the number of tokens that decode in one step of {operator}",
        group.most_tokens,
        limits.most_tokens,
        f"lower maxBatchSize, raise ExpertMesh.microBatches, {level_1}",
    )
    yield _buffer_finding(group, generation, buffer_mb, f"lower maxBatchSize, {level_1}")


def least_buffer_mb(group: ExpertGroup, generation: Generation) -> int:
    """The least HCCL_BUFFSIZE with which BS tokens of every rank can be dispatched, without a hierarchy.

    A2: 2 * (BS * ep * min(E / ep, K) * 2 D + 2 MB). A3: 2 * (E / ep * BS * ep * align512(align32(2 D) + 64)
    + K * BS * align512(2 D)). DeepSeek-R1 on 16 A2 with BS 256 needs 900 MB, on 16 A3 with BS 64 478 MB.
    """
    tokens, row = group.most_tokens, BYTES_16_BIT * group.hidden_size
    if generation == "A2":
        rows = tokens * group.ep_size * min(group.num_local_experts, group.num_experts_per_tok)
        num_bytes = 2 * (rows * row + 2 * MEBIBYTE)
    else:
        arriving = group.num_local_experts * tokens * group.ep_size * _aligned(_aligned(row, 32) + 64, 512)
        leaving = group.num_experts_per_tok * tokens * _aligned(row, 512)
        num_bytes = 2 * (arriving + leaving)
    return -(-num_bytes // MEBIBYTE)


def _buffer_finding(
    group: ExpertGroup, generation: Generation, buffer_mb: int | None, otherwise: str
) -> Finding:
    least = least_buffer_mb(group, generation)
    found = f"{DEFAULT_BUFFER_MB} MB (not set)" if buffer_mb is None else f"{buffer_mb} MB"
    return Finding(
        what="HCCL_BUFFSIZE",
        needed=f"at least {least} MB ({group.most_tokens} tokens, moe_ep {group.ep_size}, {generation})",
        found=found,
        is_met=(DEFAULT_BUFFER_MB if buffer_mb is None else buffer_mb) >= least,
        remedy=f"set HCCL_BUFFSIZE={least} for the router and every worker, {otherwise}",
    )


def _at_most(what: str, found: int, most: int, remedy: str) -> Finding:
    return Finding(what, f"at most {most}", str(found), found <= most, remedy)


def _aligned(number: int, step: int) -> int:
    return -(-number // step) * step
