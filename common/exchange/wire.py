"""Messages of the exchange: a fixed int64 header, then the arrays of the kind, in one flat uint8 buffer.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from operator import attrgetter

import torch
from torch import Tensor

from common.errors import MessageError

MAGIC = 0x45584D4553483031
STEP = 1
ROWS = 2
REPLY = 3
GOODBYE = 4
MAX_BYTES = 1 << 36
"""No step may announce a larger buffer."""


@dataclass(slots=True)
class Header:
    """The fixed part of every message; one int64 each, in this order. GOODBYE ends a link from either side.

    `pass_rows` and `is_grouped` are a StepHeader's; `first_key` (ROWS, level 1) is the slot key of the
    worker's first expert; `is_int8` (ROWS, level 2) says that rows are int8 and have scales.
    `capacity_bytes` (STEP) bounds every later message of the step; in a collective's ROWS it is the length of
    the collective that follows, or of the rows that come through the worker's window instead: `is_window`
    (level 2) says so, and they are in the model's dtype. Stamps (REPLY) are the worker's clock.
    """

    kind: int
    term: int
    epoch: int
    incarnation: int
    step_id: int
    layer_id: int = -1
    micro_batch: int = 0
    round: int = 0
    rounds: int = 1
    ep_level: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_experts: int = 0
    num_bytes: int = 0
    capacity_bytes: int = 0
    micro_batches: int = 1
    pass_rows: int = 0
    first_key: int = 0
    is_grouped: int = 1
    is_int8: int = 0
    is_window: int = 0
    received_ns: int = 0
    compute_start_ns: int = 0
    compute_end_ns: int = 0


HEADER_WORDS = len(fields(Header)) + 1
HEADER_BYTES = 8 * HEADER_WORDS
_words_of = attrgetter(*(field.name for field in fields(Header)))
_packed = struct.Struct(f"={HEADER_WORDS}q")


def size_class(count: int) -> int:
    """The power of two that holds `count`; at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def total_bytes(*arrays: Tensor) -> int:
    """Length of a message with these arrays."""
    return HEADER_BYTES + sum(array.numel() * array.element_size() for array in arrays)


def pack(buffer: Tensor, header: Header, *arrays: Tensor) -> Tensor:
    """Write a message to the front of `buffer` and return that part of it.

    Arrays follow one another without gaps: hand them over in falling order of element size.
    """
    header.num_bytes = total_bytes(*arrays)
    if header.num_bytes > buffer.numel():
        raise MessageError(
            f"a message of {header.num_bytes} bytes exceeds the {buffer.numel()} bytes announced for its step"
        )
    words = bytearray(_packed.pack(MAGIC, *_words_of(header)))
    buffer[:HEADER_BYTES].copy_(torch.frombuffer(words, dtype=torch.uint8))
    write_arrays(buffer[HEADER_BYTES:], *arrays)
    return buffer[: header.num_bytes]


def write_arrays(buffer: Tensor, *arrays: Tensor) -> None:
    """Write arrays to the front of `buffer`, one after another, in falling order of element size."""
    offset = 0
    for array in arrays:
        length = array.numel() * array.element_size()
        if length:
            buffer[offset : offset + length].view(array.dtype).copy_(array.reshape(-1))
        offset += length


def unpack_header(buffer: Tensor) -> Header:
    """Read and check what every message has in common. Raises MessageError."""
    if buffer.numel() < HEADER_BYTES:
        raise MessageError(f"a buffer of {buffer.numel()} bytes cannot hold a header of {HEADER_BYTES}")
    magic, *words = buffer[:HEADER_BYTES].view(torch.int64).tolist()
    header = Header(*words)
    if magic != MAGIC or header.kind not in (STEP, ROWS, REPLY, GOODBYE):
        raise MessageError(f"a message with magic {magic:#x} and kind {header.kind} is not of this protocol")
    counts = (header.num_tokens, header.num_rows, header.num_experts, header.capacity_bytes, header.round)
    if min(counts) < 0 or not HEADER_BYTES <= header.num_bytes <= buffer.numel():
        raise MessageError(f"a message announces impossible sizes: {header}")
    return header


def unpack(buffer: Tensor, header: Header, *layout: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Views of the arrays of a message; `layout` is what the reader expects. Raises MessageError."""
    expected = HEADER_BYTES + sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout)
    if expected != header.num_bytes:
        raise MessageError(f"a message of {header.num_bytes} bytes was expected to have {expected}: {header}")
    return view_arrays(buffer[HEADER_BYTES:], *layout)


def view_arrays(buffer: Tensor, *layout: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Views of the arrays that `write_arrays` wrote."""
    arrays: list[Tensor] = []
    offset = 0
    for shape, dtype in layout:
        length = torch.Size(shape).numel() * dtype.itemsize
        arrays.append(buffer[offset : offset + length].view(dtype).view(shape))
        offset += length
    return arrays
