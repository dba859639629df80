"""How many blocks the KV cache gets: what fits the budget, and no more than full batches can use. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from common.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class KvCacheSize:
    """The cache of one router.

    Attributes:
        max_seq_len: most tokens of prompt and answer.
        bytes_per_block: over all layers.
    """

    num_blocks: int
    max_seq_len: int
    bytes_per_block: int

    @property
    def num_bytes(self) -> int:
        """The memory it takes when it is full."""
        return self.num_blocks * self.bytes_per_block


def bytes_per_block(model: ModelConfig, block_size: int, item_bytes: int) -> int:
    """One block of `block_size` tokens: a latent and a rotated key for each token and layer."""
    width = model.kv_lora_rank + model.qk_rope_head_dim
    return model.num_hidden_layers * block_size * width * item_bytes


def fit_kv_cache(
    model: ModelConfig,
    budget_bytes: int,
    block_size: int,
    item_bytes: int,
    max_seq_len: int | None,
    max_batch_size: int,
) -> KvCacheSize:
    """Fit cache and sequences into the budget; no block where the budget holds none.

    Args:
        model: gives the size of a token, and the positions it knows.
        budget_bytes: of the whole cache.
        block_size: tokens of a block.
        item_bytes: of one number of the cache.
        max_seq_len: what is asked for; None: as much as the model and the budget allow.
        max_batch_size: sequences that run at a time.
    """
    per_block = bytes_per_block(model, block_size, item_bytes)
    num_blocks = budget_bytes // per_block
    most = min(model.max_position_embeddings, num_blocks * block_size)
    length = most if max_seq_len is None else min(max_seq_len, most)
    useful = max_batch_size * -(-length // block_size)
    return KvCacheSize(min(num_blocks, useful), length, per_block)
