"""A fingerprint of a worker's arithmetic: workers with the same one give the same bits for the same rows."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from common.quantization.w8a8 import quantize_channels
from expert_worker.kernels import ExpertKernels

HIDDEN_SIZE = 1024  # long enough for a matrix kernel to cut its sum into parts
MOE_INTERMEDIATE_SIZE = 176
TOKENS_PER_EXPERT = (1, 0, 2, 5, 16, 33)
DTYPES = (torch.float32, torch.bfloat16)


def arithmetic_hash(kernels: ExpertKernels, device: torch.device | str = "cpu") -> str:
    """Run fixed rows through fixed experts, in floating point and in int8, and hash the bits that come out.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for output in _probe(kernels, dtype, torch.device(device)):
            digest.update(output.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(
    kernels: ExpertKernels, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:  # 2 x [R, D]
    num_experts = len(TOKENS_PER_EXPERT)
    up_shape = (num_experts, MOE_INTERMEDIATE_SIZE, HIDDEN_SIZE)
    gate = _numbers(1, up_shape).to(device, dtype)
    up = _numbers(2, up_shape).to(device, dtype)
    down = _numbers(3, (num_experts, HIDDEN_SIZE, MOE_INTERMEDIATE_SIZE)).to(device, dtype)
    rows = _numbers(4, (sum(TOKENS_PER_EXPERT), HIDDEN_SIZE)).to(device, dtype)
    counts = torch.tensor(TOKENS_PER_EXPERT)
    packed = kernels.pack(list(gate.clone()), list(up), list(down))
    gate8, up8, down8 = (list(map(quantize_channels, one)) for one in (gate, up, down))
    in_int8 = kernels.pack_int8(gate8, up8, down8, dtype)
    return kernels.experts(rows, None, counts, packed), kernels.int8_experts(rows, None, counts, in_int8)


def _numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return scattered float32 in [-0.5, 0.5), made from integers so that no library can change them."""
    count = 1
    for size in shape:
        count *= size
    # Knuth's multiplicative hash; its high bits are squared against the lattice that a plain multiple leaves.
    mixed = (torch.arange(count) + seed * 7919) * 2654435761 % (1 << 32)
    mixed = (mixed >> 8) * (mixed >> 8) % (1 << 31) >> 11
    return (mixed.to(torch.float32) / (1 << 20) - 0.5).view(shape)
