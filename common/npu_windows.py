"""Where rows lie in the windows of npu_attention_to_ffn and npu_ffn_to_attention, and their limits. Pure.

A window is device memory that other ranks write to. Both are documented as an info table, and the rows behind
it from the next multiple of 512 bytes. A worker's: a flag, the layer, then the local expert of every slot of
every token. The router's: a flag for every slot. One router and one micro-batch, T tokens of K slots.
Sources: op-plugin's documentation and tests of the two operators, and their kernels in ops-transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 512
"""BS of both operators."""
MOST_SLOTS = 16
"""K of both."""
MOST_EXPERTS = 1024
"""moe_expert_num."""
GROUP_SIZES = range(2, 769)
TAIL_COLUMNS = 128
"""What a reply's row has beyond the hidden size: documented for scales, here the header of the reply."""
HIDDEN_SIZES = range(1024, 8192 - TAIL_COLUMNS + 1)
"""Of both operators, and whatever the documents mean by H and HS of the second: with and without the tail."""
INFO_BYTES = 4
ROW_ITEM_BYTES = 2
HEAD_WORDS = 2
"""The flag and the layer before the slots of a worker's table."""
ALIGNMENT = 512
MEGABYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class WindowLayout:
    """The windows of one epoch.

    Attributes:
        num_tokens: T, most tokens of one micro-batch that travels through them.
        top_k: K.
        num_experts: local experts of all workers, as npu_attention_to_ffn counts experts.
    """

    num_tokens: int
    top_k: int
    hidden_size: int
    num_experts: int

    @property
    def num_slots(self) -> int:
        """T * K."""
        return self.num_tokens * self.top_k

    @property
    def worker_table(self) -> list[int]:
        """ffn_token_info_table_shape."""
        return [1, 1, HEAD_WORDS + self.num_slots]

    @property
    def worker_rows(self) -> list[int]:
        """ffn_token_data_shape."""
        return [1, 1, self.num_tokens, self.top_k, self.hidden_size]

    @property
    def router_flags(self) -> list[int]:
        """attn_token_info_table_shape, token_info_table_shape."""
        return [1, self.num_tokens, self.top_k]

    @property
    def router_columns(self) -> int:
        """Length of a row on its way home."""
        return self.hidden_size + TAIL_COLUMNS

    @property
    def router_rows(self) -> list[int]:
        """token_data_shape."""
        return [1, self.num_tokens, self.top_k, self.router_columns]

    @property
    def worker_rows_at(self) -> int:
        """Byte of a worker's window where rows begin."""
        return _aligned(INFO_BYTES * (HEAD_WORDS + self.num_slots))

    @property
    def router_rows_at(self) -> int:
        """Byte of the router's window where rows begin."""
        return _aligned(INFO_BYTES * self.num_slots)

    @property
    def worker_bytes(self) -> int:
        """Length of a worker's window."""
        return self.worker_rows_at + ROW_ITEM_BYTES * self.num_slots * self.hidden_size

    @property
    def router_bytes(self) -> int:
        """Length of the router's window."""
        return self.router_rows_at + ROW_ITEM_BYTES * self.num_slots * self.router_columns

    @property
    def least_buffer_mb(self) -> int:
        """The HCCL_BUFFSIZE that the operators want, although their windows are not HCCL's buffers."""
        return max(self.worker_bytes, self.router_bytes) // MEGABYTE + 1


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
