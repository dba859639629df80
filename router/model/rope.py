"""Rotary positions, plain and YaRN, as DeepSeek's modeling code defines them.

Where transformers differs (it drops `mscale` if `mscale_all_dim` is missing), DeepSeek's definition holds.
Shapes: T tokens, R qk_rope_head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.model_config import ModelConfig, YarnScaling

CHUNK = 256
"""Positions computed at once: one fixed size, so that a position's bits never depend on how far the table
reaches, and small enough that torch computes it in one thread."""


class RotaryTable:
    """cos and sin of every position seen so far, [positions, R/2] float32. Grows on demand, never changes.

    Always computed on the CPU, so that every device rotates by the same bits.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._inv_freq = inverse_frequencies(config)
        self._scale = table_scale(config.rope_scaling)
        self._cos = torch.empty(0, len(self._inv_freq), device="cpu")
        self._sin = torch.empty(0, len(self._inv_freq), device="cpu")

    def lookup(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:  # [T] -> 2 x [T, R/2]
        """Return cos and sin of `positions`, all of them below `num_positions`."""
        if num_positions > len(self._cos) or self._cos.device != positions.device:
            self._grow(num_positions, positions.device)
        return self._cos[positions], self._sin[positions]

    def _grow(self, num_positions: int, device: torch.device) -> None:
        """Reach at least twice as far, so that growing costs little in all."""
        length = max(num_positions, 2 * len(self._cos))
        angles = [
            torch.outer(torch.arange(first, first + CHUNK, dtype=torch.float32, device="cpu"), self._inv_freq)
            for first in range(0, length, CHUNK)
        ]
        self._cos = torch.cat([chunk.cos() * self._scale for chunk in angles]).to(device)
        self._sin = torch.cat([chunk.sin() * self._scale for chunk in angles]).to(device)


def inverse_frequencies(config: ModelConfig) -> Tensor:  # [R/2]
    """Return the angle by which each rotated pair turns from one position to the next."""
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    powers = config.rope_theta**exponents
    plain = 1.0 / powers
    yarn = config.rope_scaling
    if yarn is None:
        return plain
    stretched = 1.0 / (yarn.factor * powers)
    low, high = _blend_range(yarn, dim, config.rope_theta)
    # 0 for the fast pairs, which stay as they were trained, 1 for the slow ones, which are stretched in full.
    blend = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return stretched * blend + plain * (1 - blend)


def _blend_range(yarn: YarnScaling, dim: int, theta: float) -> tuple[float, float]:
    """Return the pairs between which YaRN blends: they turn beta_fast and beta_slow times in training."""

    def pair_that_turns(times: float) -> float:
        turns = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # The published code avoids a division by zero in just this way; the number is part of the definition.
    return low, high + 0.001 if low == high else high


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return by how much attention must be sharpened after positions were stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def table_scale(yarn: YarnScaling | None) -> float:
    """Return what cos and sin are multiplied with: a quotient, since `softmax_scale` has the other half."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """Return what attention scores are multiplied with."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is None or not yarn.mscale_all_dim:
        return scale
    return scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
