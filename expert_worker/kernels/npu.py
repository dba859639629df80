"""The expert worker's operations on an Ascend NPU: all experts of a layer in one grouped product.

Operators and limits: common.npu_limits. What is outside of them is computed by the reference, on the NPU too.
Shapes: R rows, E_local local experts, T tokens, K experts per token, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch_npu
from torch import Tensor

from common import npu_limits
from common.exchange.routing import LocalRows, local_of
from common.exchange.routing import expand_rows as expand_plainly
from common.int8_reference import PackedInt8
from expert_worker.kernels import PackedExperts, PackedInt8Experts, reference
from expert_worker.kernels.reference import joined, pack, pack_int8

__all__ = [
    "expand_rows",
    "experts",
    "int8_experts",
    "is_fused",
    "join",
    "join_int8",
    "joined",
    "pack",
    "pack_int8",
]

logger = logging.getLogger(__name__)

PLAIN, FRACTAL_NZ = 2, 29
"""torch_npu's numbers of memory formats."""
ONE_RESULT, BY_ROWS = 2, 0
"""npu_grouped_matmul: split_item and group_type for one x, cut along its rows, and one result."""
CUMULATIVE = 0
"""npu_grouped_matmul: group_list_type where group_list says where each expert's rows end."""
COUNTS = 1
"""npu_moe_init_routing_v2: expert_tokens_num_type where it returns rows per expert."""
PER_TOKEN = 1
"""npu_dequant_swiglu_quant: quant_mode where every row gets a scale of its own."""

# Without it torch_npu lays a tensor out plainly instead of in FRACTAL_NZ, with no more than a warning, and
# npu_grouped_matmul_swiglu_quant would take it for one in FRACTAL_NZ all the same.
torch_npu.npu.config.allow_internal_format = True


@dataclass(frozen=True, slots=True)
class StackedExperts(PackedExperts):
    """The experts of a layer with their weights in one tensor each; what is per expert is a view of it.

    Attributes:
        gate_up_stack: [E_local, 2F, D].
        down_stack: [E_local, D, F].
    """

    gate_up_stack: Tensor
    down_stack: Tensor


@dataclass(frozen=True, slots=True)
class StackedInt8Experts(PackedInt8Experts):
    """The int8 experts of a layer with their weights in one tensor each, or one expert of such a layer.

    What is per expert is a `_Place`: a tensor in FRACTAL_NZ has no views.

    Attributes:
        gate_up_stack: [E_local, D, 2F] in FRACTAL_NZ.
        gate_up_scale: [E_local, 2F] float32.
        down_stack: [E_local, D, F].
        down_scale: [E_local, D] in the dtype of results, as npu_grouped_matmul wants it.
    """

    gate_up_stack: Tensor
    gate_up_scale: Tensor
    down_stack: Tensor
    down_scale: Tensor

    def each(self) -> Iterator[PackedInt8Experts]:
        """Yield every expert, with the stacks it lies in."""
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            yield replace(self, gate_up=(gate_up,), down=(down,))


@dataclass(frozen=True, slots=True)
class _Place(PackedInt8):
    """One expert's matrix in a stack, which is its one part; the scale is its own."""

    index: int


def join(parts: Sequence[PackedExperts]) -> PackedExperts:
    """Put all parts' experts one after another, each kind of weight into one tensor."""
    if not parts:
        return reference.join(parts)
    gate_up = _stacked([one for part in parts for one in part.gate_up])
    down = _stacked([one for part in parts for one in part.down])
    why_not = npu_limits.grouped_matmul(len(down), down.shape[1], down.shape[2])
    if why_not is not None:
        logger.info("experts are computed one by one: npu_grouped_matmul cannot be used, because %s", why_not)
        return reference.join(parts)
    return StackedExperts(tuple(gate_up.unbind()), tuple(down.unbind()), gate_up, down)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all parts; without a copy where they are all the views of one, in order."""
    first = parts[0]
    num_bytes = first.numel() * first.element_size()
    follow = all(part.data_ptr() == first.data_ptr() + index * num_bytes for index, part in enumerate(parts))
    end = first.storage_offset() * first.element_size() + len(parts) * num_bytes
    if follow and end <= first.untyped_storage().nbytes():
        shape = (len(parts), *first.shape)
        return first.as_strided(shape, (first.numel(), *first.stride()), first.storage_offset())
    return torch.stack(list(parts))


def experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedExperts,
    on_progress: Callable[[], None] | None = None,
    is_grouped: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run all rows through their experts in two grouped products, the only ones that round as they do."""
    if not isinstance(packed, StackedExperts):
        return reference.experts(rows, row_scales, tokens_per_expert, packed, on_progress, is_grouped, out)
    if row_scales is not None:
        rows = (rows.float() * row_scales.unsqueeze(1)).to(packed.down_stack.dtype)
    if not len(rows):
        return torch.empty_like(rows)
    ends = tokens_per_expert.cumsum(0).to(rows.device)
    gate_up = _grouped(rows, packed.gate_up_stack, ends)
    output = _grouped(torch_npu.npu_swiglu(gate_up), packed.down_stack, ends)
    _report(on_progress)
    return output


def _grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:  # [R, in], [E, out, in], [E] -> [R, out]
    outputs: list[Tensor] = torch_npu.npu_grouped_matmul(
        [rows],
        [stack.transpose(1, 2)],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
    )
    return outputs[0]


def join_int8(parts: Sequence[PackedInt8Experts]) -> PackedInt8Experts:
    """Put all parts' experts one after another, each kind of weight into one tensor."""
    ups = tuple(one for part in parts for one in part.gate_up)
    downs = tuple(one for part in parts for one in part.down)
    if isinstance(parts[0], StackedInt8Experts) and _is_whole(downs):
        return replace(parts[0], gate_up=ups, down=downs)
    gate_up = [_plain(one) for one in ups]
    down = [_plain(one) for one in downs]
    dtype = parts[0].dtype
    hidden_size, intermediate_size = down[0].shape
    why_not = npu_limits.grouped_int8(
        len(down), hidden_size, intermediate_size, str(dtype).removeprefix("torch.")
    )
    if why_not is not None:
        logger.info(
            "int8 experts are computed one by one: %s cannot be used, because %s",
            "npu_grouped_matmul_swiglu_quant",
            why_not,
        )
        return reference.join_int8(parts)
    turned = torch.stack(gate_up).transpose(1, 2).contiguous()
    gate_up_stack = torch_npu.npu_format_cast(turned, FRACTAL_NZ)
    down_stack = torch.stack(down)
    return StackedInt8Experts(
        tuple(_Place((gate_up_stack,), one.scale, None, index) for index, one in enumerate(ups)),
        tuple(_Place((down_stack,), one.scale, None, index) for index, one in enumerate(downs)),
        dtype,
        gate_up_stack,
        torch.stack([one.scale for one in ups]),
        down_stack,
        torch.stack([one.scale for one in downs]).to(dtype),
    )


def _is_whole(ones: Sequence[PackedInt8]) -> bool:
    """Whether these are all experts of one stack, in order."""
    stack = ones[0].parts[0]
    return len(stack) == len(ones) and all(
        isinstance(one, _Place) and one.parts[0] is stack and one.index == index
        for index, one in enumerate(ones)
    )


def _plain(one: PackedInt8) -> Tensor:
    """An expert's weight [out, in] in the plain format, out of its stack where it is in one."""
    if not isinstance(one, _Place):
        return one.parts[0]
    stack = one.parts[0]
    if torch_npu.get_npu_format(stack) == FRACTAL_NZ:
        return torch_npu.npu_format_cast(stack, PLAIN)[one.index].t()
    return stack[one.index]


def int8_experts(
    rows: Tensor,
    row_scales: Tensor | None,
    tokens_per_expert: Tensor,
    packed: PackedInt8Experts,
    on_progress: Callable[[], None] | None = None,
    is_grouped: bool = True,
    out: Tensor | None = None,
) -> Tensor:  # [R, D] -> [R, D]
    """Run all rows through their experts: a product fused with SwiGLU and quantisation, then another one.

    Without `is_grouped` the first one is three operators instead.
    """
    if not isinstance(packed, StackedInt8Experts):
        return reference.int8_experts(
            rows, row_scales, tokens_per_expert, packed, on_progress, is_grouped, out
        )
    if not len(rows):
        return torch.empty(rows.shape, dtype=packed.dtype, device=rows.device)
    if row_scales is None:
        rows, row_scales = torch_npu.npu_dynamic_quant(rows)
    ends = tokens_per_expert.cumsum(0).to(rows.device)
    is_fused = is_grouped or npu_limits.dequant_swiglu(packed.down_stack.shape[2]) is not None
    first = _fused_product if is_fused else _three_operators
    hidden, hidden_scales = first(rows, row_scales, tokens_per_expert, ends, packed)
    output: Tensor = torch_npu.npu_grouped_matmul(
        [hidden],
        [packed.down_stack.transpose(1, 2)],
        scale=[packed.down_scale],
        per_token_scale=[hidden_scales],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
        output_dtype=packed.dtype,
    )[0]
    _report(on_progress)
    return output


def _fused_product(
    rows: Tensor, row_scales: Tensor, counts: Tensor, ends: Tensor, packed: StackedInt8Experts
) -> tuple[Tensor, Tensor]:  # -> [R, F] int8, [R]
    hidden, scales, _ = torch_npu.npu_grouped_matmul_swiglu_quant(
        rows, packed.gate_up_stack, ends, packed.gate_up_scale, row_scales
    )
    return hidden, scales


def _three_operators(
    rows: Tensor, row_scales: Tensor, counts: Tensor, ends: Tensor, packed: StackedInt8Experts
) -> tuple[Tensor, Tensor]:  # -> [R, F] int8, [R]
    (sums,) = torch_npu.npu_grouped_matmul(
        [rows],
        [packed.gate_up_stack],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=BY_ROWS,
        group_list_type=CUMULATIVE,
        output_dtype=torch.int32,
    )
    hidden, scales = torch_npu.npu_dequant_swiglu_quant(
        sums,
        weight_scale=packed.gate_up_scale,
        activation_scale=row_scales,
        group_index=counts.to(rows.device),
        activate_left=True,
        quant_mode=PER_TOKEN,
    )
    return hidden, scales


def _report(on_progress: Callable[[], None] | None) -> None:
    if on_progress is not None:
        on_progress()


def is_fused(packed: PackedExperts | PackedInt8Experts) -> bool:
    """Whether one call of each operator runs all experts: where their weights are stacked."""
    return isinstance(packed, StackedExperts | StackedInt8Experts)


def expand_rows(
    hidden: Tensor, slot_keys: Tensor, topk_weights: Tensor, first_key: int, num_local: int
) -> LocalRows:  # [T, D], 2 x [T, K]
    """Pick the rows of this worker's own experts from all tokens, sorted by expert."""
    if not num_local or not slot_keys.numel() or first_key + num_local > npu_limits.MOST_SORTED_EXPERTS:
        return expand_plainly(hidden, slot_keys, topk_weights, first_key, num_local)
    last_key = first_key + num_local
    local = local_of(slot_keys, first_key, num_local)
    # Experts of other workers become one that is out of the range, for the operator sorts by expert.
    keys = torch.where(local < num_local, slot_keys, last_key).to(torch.int32)
    expanded, row_of, counts, _ = torch_npu.npu_moe_init_routing_v2(
        hidden,
        keys.to(hidden.device),
        active_num=keys.numel(),
        expert_num=last_key + 1,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[first_key, last_key],
    )
    tokens_per_expert = counts.to(slot_keys.device)
    num_rows = int(tokens_per_expert.sum())
    position_of = row_of.to(slot_keys.device, torch.int64).view(slot_keys.shape)
    position_of = torch.where(position_of < 0, num_rows, position_of)
    weights = torch.where(local < num_local, topk_weights, 0.0)
    return LocalRows(expanded[:num_rows], tokens_per_expert, position_of, weights)
