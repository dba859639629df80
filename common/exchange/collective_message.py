"""What the collectives of a group carry, and how long it is: both ends compute every size here.

Lengths that differ between ranks abort the process, so the metadata announces what follows it and its reader
compares. Shapes: T tokens, K experts per token, R rows, D hidden_size, M most experts that any worker holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.errors import MessageError
from common.exchange import ALL_GATHER, checks, wire
from common.exchange.routing import RowShape

OPENING_WORDS = 2
MOST_EXPERTS = 1 << 16
"""More experts than this in one layer of one worker are no placement."""


def opening(most_local: int) -> Tensor:
    """The first broadcast of a group, [OPENING_WORDS] int64: it fixes the length of all metadata."""
    return torch.tensor([wire.MAGIC, most_local], dtype=torch.int64)


def check_opening(words: Tensor, experts: Mapping[int, tuple[int, ...]]) -> int:
    """M, as the router says it in its opening. Raises MessageError."""
    magic, most_local = words.tolist()
    held = max((len(own) for own in experts.values()), default=0)
    if magic != wire.MAGIC or not held <= most_local <= MOST_EXPERTS:
        raise MessageError(
            f"a group was opened with magic {magic:#x} for {most_local} experts a worker, this one has {held}"
        )
    return int(most_local)


def metadata_words(most_local: int) -> int:
    """Length of one worker's metadata."""
    return wire.HEADER_WORDS + most_local


def pack_metadata(header: wire.Header, counts: Tensor | None, most_local: int) -> Tensor:
    """A header and rows per expert [E_local], zero past them: [metadata_words] int64."""
    padded = torch.zeros(most_local, dtype=torch.int64)
    if counts is not None:
        padded[: counts.numel()] = counts
    words = torch.empty(metadata_words(most_local), dtype=torch.int64)
    wire.pack(words.view(torch.uint8), header, padded)
    return words


def unpack_metadata(words: Tensor) -> tuple[wire.Header, Tensor]:
    """The header, and rows per expert [M]. Raises MessageError."""
    buffer = words.view(torch.uint8)
    header = wire.unpack_header(buffer)
    (counts,) = wire.unpack(buffer, header, ((words.numel() - wire.HEADER_WORDS,), torch.int64))
    return header, counts


def body_bytes(
    ep_level: int, layer_ids: Iterable[int], num_tokens: int, num_rows: int, shape: RowShape
) -> int:
    """Length of what a worker takes after the metadata: all tokens at level 1, its rows at level 2.

    Of several layers, that of the layer that has most.
    """
    if ep_level == ALL_GATHER:
        return num_tokens * (12 * shape.num_experts_per_tok + shape.row_bytes)
    return shape.sent_bytes(layer_ids, num_rows)


def pack_tokens(slot_keys: Tensor, topk_weights: Tensor, hidden_states: Tensor, shape: RowShape) -> Tensor:
    """The body at level 1: slot keys [T, K], weights [T, K] and rows [T, D] in one flat uint8 tensor."""
    length = body_bytes(ALL_GATHER, (), hidden_states.shape[0], 0, shape)
    buffer = torch.empty(length, dtype=torch.uint8, device=hidden_states.device)
    wire.write_arrays(buffer, slot_keys, topk_weights, hidden_states)
    return buffer


def unpack_tokens(buffer: Tensor, num_tokens: int, shape: RowShape) -> tuple[Tensor, Tensor, Tensor]:
    """What pack_tokens packed: slot keys [T, K] int64, weights [T, K] float32, rows [T, D]."""
    slots = (num_tokens, shape.num_experts_per_tok)
    keys, weights, rows = wire.view_arrays(
        buffer, (slots, torch.int64), (slots, torch.float32), ((num_tokens, shape.hidden_size), shape.dtype)
    )
    return keys, weights, rows


def check_body(header: wire.Header, counts: Tensor, num_local: int, shape: RowShape, limit: int) -> None:
    """Refuse a body of another length than its receiver would take. Raises MessageError."""
    if header.ep_level != ALL_GATHER:
        checks.check_counts(counts[:num_local], header.num_rows)
    length = body_bytes(header.ep_level, [header.layer_id], header.num_tokens, header.num_rows, shape)
    if header.capacity_bytes != length or length > limit:
        raise MessageError(
            f"a body of {header.capacity_bytes} bytes was announced: it should have {length}, at most {limit}"
        )


def reply_words(header: wire.Header, shape: RowShape) -> int:
    """Length in int64 words of the reply to ROWS: a partial sum [T, D] at level 1, rows [R, D] at level 2."""
    if header.ep_level == ALL_GATHER:
        return wire.HEADER_WORDS + header.num_tokens * shape.hidden_size
    return wire.HEADER_WORDS + -(-header.num_rows * shape.hidden_size * shape.dtype.itemsize // 8)
