"""The operations an expert worker needs from its device. A device is a module that has them all.

Shapes: R rows, E_local local experts, D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from common.device import find_device
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weights of a layer's local experts, in the order the worker holds them.

    Attributes:
        gate_up: per expert [2F, D], gate_proj above up_proj: one product where the checkpoint has two.
        down: per expert [D, F].
    """

    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


class ExpertKernels(Protocol):
    """What a module in this package must define. No result depends on other rows of the same call."""

    def pack(
        self, gate_proj: Iterable[Tensor], up_proj: Iterable[Tensor], down_proj: Iterable[Tensor]
    ) -> PackedExperts:
        """Lay out the weights of a layer's experts, given per expert as [F, D], [F, D] and [D, F].

        Nothing of gate_proj and up_proj is kept, down_proj may be: with iterators that read one expert at a
        time, no more than one expert exists twice.
        """

    def experts(
        self,
        rows: Tensor,
        row_scales: Tensor | None,
        tokens_per_expert: Tensor,
        packed: PackedExperts,
        on_progress: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run every row through its expert.

        Args:
            rows: [R, D], sorted by local expert; R may be 0.
            row_scales: [R] float32 if rows are quantised and stand for rows * row_scales, else None.
            tokens_per_expert: [E_local] int64 on the CPU; sums to R, may hold zeros.
            packed: what `pack` returned.
            on_progress: called after each expert that had rows.

        Returns:
            [R, D] in the dtype of rows, or of the weights if rows are quantised.
        """


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
