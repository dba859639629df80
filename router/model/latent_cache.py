"""The paged cache of attention: per token one compressed latent and one rotated key, never expanded heads.

Shapes: L layers, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from common.model_config import ModelConfig


class LatentCache:
    """kv_c (after its norm) and k_pe (rotated) of every cached token.

    Owned by the engine, written by the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.block_size = block_size
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, num_blocks, block_size, width)
        self._blocks = _zeros(shape, dtype, torch.device(device))  # [L, blocks, block_size, C + R]

    @property
    def num_blocks(self) -> int:
        """Blocks the cache has."""
        return self._blocks.shape[1]

    def layer(self, layer_id: int) -> Tensor:  # [blocks, block_size, C + R]
        """Return the blocks of one layer, to be read and written in place."""
        return self._blocks[layer_id]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate zeros; on a CPU the system hands out the pages when they are first written.

    Zeros rather than whatever was there: a kernel may multiply hidden keys by 0, and 0 times NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    # Whole pages: matrix kernels may round differently on memory that is aligned to less than a cache line.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel may be built without them
            # A sequence fills its blocks from the front: large pages would take memory for the rest as well.
            # Attention was no slower with small ones, for contexts from 64 to 4096 tokens.
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
