"""The operations an expert worker needs from its device. A device is a module that has them all.

Shapes: R rows, E_local local experts, T tokens, K experts per token, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from common.device import find_device
from common.errors import ConfigError
from common.exchange.routing import LocalRows
from common.int8_reference import PackedInt8
from common.native_int8 import JoinedExperts
from common.quantization.w8a8 import Int8Weight


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weights of a layer's local experts, in the order the worker holds them.

    Attributes:
        gate_up: per expert [2F, D], gate_proj above up_proj: one product where the checkpoint has two.
        down: per expert [D, F].
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]

    def each(self) -> Iterator[PackedExperts]:
        """Yield every expert as a part that can be joined with others again."""
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            yield PackedExperts((gate_up,), (down,))


@dataclass(frozen=True, slots=True)
class PackedInt8Experts:
    """The int8 weights of a layer's local experts, in the order the worker holds them.

    Attributes:
        gate_up: per expert [2F, D], gate_proj above up_proj.
        down: per expert [D, F].
        dtype: of results, and of rows that are not quantised.
    """

    gate_up: tuple[PackedInt8, ...]
    down: tuple[PackedInt8, ...]
    dtype: torch.dtype

    def each(self) -> Iterator[PackedInt8Experts]:
        """Yield every expert as a part that can be joined with others again."""
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            yield PackedInt8Experts((gate_up,), (down,), self.dtype)


class ExpertKernels(Protocol):
    """What a module in this package must define. No result depends on other rows of the same call."""

    def pack(
        self, gate_proj: Iterable[Tensor], up_proj: Iterable[Tensor], down_proj: Iterable[Tensor]
    ) -> PackedExperts:
        """Lay out the weights of a layer's experts, given per expert as [F, D], [F, D] and [D, F].

        Nothing of gate_proj and up_proj is kept, down_proj may be: with iterators that read one expert at a
        time, no more than one expert exists twice.
        """

    def join(self, parts: Sequence[PackedExperts]) -> PackedExperts:
        """Put all parts' experts one after another, as `experts` takes them; there is one part at least.

        What `each` of the result yields takes the place of the parts: the weights may have been moved.
        """

    def experts(
        self,
        rows: Tensor,
        row_scales: Tensor | None,
        tokens_per_expert: Tensor,
        packed: PackedExperts,
        on_progress: Callable[[], None] | None = None,
        is_grouped: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run every row through its expert.

        Args:
            rows: [R, D], sorted by local expert; R may be 0.
            row_scales: [R] float32 if rows are quantised and stand for rows * row_scales, else None.
            tokens_per_expert: [E_local] int64 on the CPU; sums to R, may hold zeros.
            packed: what `pack` returned.
            on_progress: called after each expert that had rows, or once where one call has run them all.
            is_grouped: whether one fused call may run all experts, where the device has one: the bits are the
                same.
            out: [R, D] in the dtype of the result, which may be written there and `out` returned: a device
                that would only copy it returns a tensor of its own.

        Returns:
            [R, D] in the dtype of rows, or of the weights if rows are quantised.
        """

    def pack_int8(
        self,
        gate_proj: Iterable[Int8Weight],
        up_proj: Iterable[Int8Weight],
        down_proj: Iterable[Int8Weight],
        dtype: torch.dtype,
    ) -> PackedInt8Experts:
        """Lay out the int8 weights of a layer's experts, as `pack` does; results have the dtype `dtype`."""

    def join_int8(self, parts: Sequence[PackedInt8Experts]) -> PackedInt8Experts:
        """Put all parts' experts one after another, as `join` does."""

    def int8_experts(
        self,
        rows: Tensor,
        row_scales: Tensor | None,
        tokens_per_expert: Tensor,
        packed: PackedInt8Experts,
        on_progress: Callable[[], None] | None = None,
        is_grouped: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run every row through its expert in int8, with the arguments of `experts`.

        Rows that are not quantised yet are quantised one by one, and so are the rows between the two
        products; SwiGLU is computed in float32 in between. The sums are exact, so that all devices agree
        but for the last bits of SwiGLU.

        Returns:
            [R, D] in the dtype of `packed`, rounded once from float32.
        """

    def expand_rows(
        self, hidden: Tensor, slot_keys: Tensor, topk_weights: Tensor, first_key: int, num_local: int
    ) -> LocalRows:
        """Pick the rows of a worker's own experts from all tokens, as expand_rows of the exchange does.

        Args:
            hidden: [T, D] on the device.
            slot_keys: [T, K] int64 and topk_weights: [T, K] float32, where sums are made.
        """

    def is_fused(self, packed: PackedExperts | PackedInt8Experts) -> bool:
        """Whether one call runs all experts of `packed`, which `join` or `join_int8` returned."""

    def joined(self, packed: PackedExperts | PackedInt8Experts) -> JoinedExperts | None:
        """What that call reads where it is the native kernels' for int8 on a CPU; None elsewhere."""


def load_kernels(device: str) -> ExpertKernels:
    """Import the module of `device` and nothing else, so vendor packages stay optional.

    Raises:
        ConfigError: there is no such device, or no kernels for it.
    """
    module = f"{__name__}.{find_device(device).name}"
    try:
        return cast(ExpertKernels, import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(
            f"device {device!r} has no expert kernels ({module} is missing): choose device 'cpu'"
        ) from error
