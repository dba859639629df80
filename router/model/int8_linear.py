"""Linear layers whose weight is int8 in the checkpoint and stays so in memory.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.int8_reference import PackedInt8
from common.quantization.description import W8A8, W8A8_DYNAMIC
from common.quantization.w8a8 import read_dynamic, read_static
from common.stored_weights import StoredWeights
from router.kernels import RouterKernels
from router.model.linear import Linear


class DynamicInt8Linear(nn.Module):
    """W8A8_DYNAMIC: every row is quantised by its own largest value."""

    def __init__(self, packed: PackedInt8, bias: Tensor | None, kernels: RouterKernels) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        """Multiply every row by the weight; the bias [out] is added in float32, then the sum is rounded."""
        return self.kernels.quantizing_linear(x, self.packed, self.bias)


class StaticInt8Linear(nn.Module):
    """W8A8: all rows are quantised by one scale and offset that msModelSlim has measured."""

    def __init__(
        self, packed: PackedInt8, input_scale: float, input_offset: float, kernels: RouterKernels
    ) -> None:
        super().__init__()
        self.packed = packed
        self.input_scale = input_scale
        self.input_offset = input_offset
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        """Multiply every row by the weight."""
        rows = self.kernels.quantize_rows_static(x, self.input_scale, self.input_offset)
        return self.kernels.int8_linear(rows, None, self.packed).to(x.dtype)


class DynamicInt8MLP(nn.Module):
    """SwiGLU of three W8A8_DYNAMIC weights, gate_proj on top of up_proj."""

    def __init__(self, gate_up: PackedInt8, down: PackedInt8, kernels: RouterKernels) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.kernels = kernels

    def forward(self, hidden_states: Tensor) -> Tensor:  # [T, D] -> [T, D]
        """Transform every token for itself."""
        return self.kernels.int8_mlp(hidden_states, self.gate_up, self.down)


def read_dynamic_mlp(
    weights: StoredWeights, path: str, gate_proj: Linear, device: torch.device
) -> DynamicInt8MLP:
    """Read what takes the place of the MLP at `path`, whose gate_proj tells its sizes."""
    size, hidden_size = gate_proj.weight.shape
    gate, up = (
        read_dynamic(weights.checkpoint, f"{path}.{name}", (size, hidden_size)).to(device)
        for name in ("gate_proj", "up_proj")
    )
    down = read_dynamic(weights.checkpoint, f"{path}.down_proj", (hidden_size, size)).to(device)
    kernels = gate_proj.kernels
    return DynamicInt8MLP(
        kernels.pack_int8(torch.cat([gate.weight, up.weight]), torch.cat([gate.scale, up.scale])),
        kernels.pack_int8(down.weight, down.scale),
        kernels,
    )


def read_dynamic_linear(
    weights: StoredWeights, path: str, linear: Linear, device: torch.device
) -> DynamicInt8Linear:
    """Read what takes the place of `linear`, which has no memory yet."""
    num_out, num_in = linear.weight.shape
    weight = read_dynamic(weights.checkpoint, path, (num_out, num_in)).to(device)
    bias = None
    if linear.bias is not None:
        bias = weights.float_tensor(f"{path}.bias", (num_out,), torch.float32).to(device)
    packed = linear.kernels.pack_int8(weight.weight, weight.scale)
    return DynamicInt8Linear(packed, bias, linear.kernels)


def read_static_linear(
    weights: StoredWeights, path: str, linear: Linear, device: torch.device
) -> StaticInt8Linear:
    """Read what takes the place of `linear`, whose bias is part of the integer bias."""
    num_out, num_in = linear.weight.shape
    stored = read_static(weights.checkpoint, path, (num_out, num_in))
    packed = linear.kernels.pack_int8(
        stored.weight.to(device), stored.deq_scale.to(device), stored.bias.to(device)
    )
    return StaticInt8Linear(packed, stored.input_scale, stored.input_offset, linear.kernels)


ReadLinear = Callable[[StoredWeights, str, Linear, torch.device], nn.Module]

READ_LINEAR: dict[str, ReadLinear] = {W8A8_DYNAMIC: read_dynamic_linear, W8A8: read_static_linear}
