"""The routed experts of one layer that this worker holds.

Shapes: R rows, E_local local experts, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from expert_worker.kernels import ExpertKernels, PackedExperts, PackedInt8Experts


class LayerExperts:
    """Weights of some experts of a layer, and the arithmetic on them. Keeps nothing of the rows it saw."""

    def __init__(
        self, expert_ids: Sequence[int], packed: PackedExperts | PackedInt8Experts, kernels: ExpertKernels
    ) -> None:
        self.expert_ids = tuple(expert_ids)
        self.is_fused = kernels.is_fused(packed)
        self.joined = kernels.joined(packed)
        self._packed = packed
        self._compute: Callable[..., Tensor]
        if isinstance(packed, PackedInt8Experts):
            self._compute = kernels.int8_experts
        else:
            self._compute = kernels.experts

    @property
    def num_local_experts(self) -> int:
        """Experts of the layer held here."""
        return len(self.expert_ids)

    def forward(
        self,
        rows: Tensor,
        tokens_per_expert: Tensor,
        on_progress: Callable[[], None] | None = None,
        row_scales: Tensor | None = None,
        is_grouped: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:  # [R, D] -> [R, D]
        """Run rows, sorted by local expert, through their experts; call `on_progress` as the kernels do.

        `is_grouped` allows one fused call for all of them, where the device has one: the bits are the same.
        The result is in `out` [R, D], or in a tensor of its own where that is None or the device cannot.
        """
        return self._compute(rows, row_scales, tokens_per_expert, self._packed, on_progress, is_grouped, out)
