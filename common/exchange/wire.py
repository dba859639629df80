"""Messages of the exchange: a fixed int64 header, then the arrays of the kind, in one flat uint8 buffer.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, fields
from math import prod
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
_HeaderMemory = ctypes.c_char * HEADER_BYTES


def size_class(count: int) -> int:
    """The power of two that holds `count`; at least 1."""
    return 1 << max(count - 1, 0).bit_length()


def total_bytes(*arrays: Tensor) -> int:
    """Length of a message with these arrays."""
    return HEADER_BYTES + sum([array.nbytes for array in arrays])


def rows_bytes(num_experts: int, num_rows: int, row_bytes: int) -> int:
    """Length of a message of ROWS at level 2: with rows per expert, then the rows, scales and all."""
    return HEADER_BYTES + 8 * num_experts + num_rows * row_bytes


def pack(buffer: Tensor, header: Header, *arrays: Tensor) -> Tensor:
    """Write a message to the front of `buffer` and return that part of it.

    Arrays follow one another without gaps: hand them over in falling order of element size.
    """
    message = front(buffer, total_bytes(*arrays))
    write_header(message, header)
    _write(message, HEADER_BYTES, arrays)
    return message


def front(buffer: Tensor, num_bytes: int) -> Tensor:
    """The part of `buffer` that a message of so many bytes takes. Raises MessageError."""
    if num_bytes > buffer.numel():
        raise MessageError(
            f"a message of {num_bytes} bytes exceeds the {buffer.numel()} bytes announced for its step"
        )
    return buffer[:num_bytes]


def packed(header: Header) -> bytes:
    """The words of a header as they travel, HEADER_BYTES long."""
    return _packed.pack(MAGIC, *_words_of(header))


def write_header(message: Tensor, header: Header) -> None:
    """Write the header of a message whose arrays may be there already."""
    header.num_bytes = message.numel()
    words = packed(header)
    if message.is_cpu:
        ctypes.memmove(message.data_ptr(), words, HEADER_BYTES)
    else:
        message[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(words), dtype=torch.uint8))


def write_arrays(buffer: Tensor, *arrays: Tensor) -> None:
    """Write arrays to the front of `buffer`, one after another, in falling order of element size."""
    if total_bytes(*arrays) - HEADER_BYTES > buffer.numel():
        raise MessageError(f"{len(arrays)} arrays exceed the {buffer.numel()} bytes they are written to")
    _write(buffer, 0, arrays)


def _write(buffer: Tensor, offset: int, arrays: tuple[Tensor, ...]) -> None:
    """Write arrays that are known to fit."""
    for array in arrays:
        length = array.nbytes
        if buffer.is_cpu and array.is_cpu and array.is_contiguous():
            # As copy_, but without the views it would need: most arrays of a decode step are short.
            ctypes.memmove(buffer.data_ptr() + offset, array.data_ptr(), length)
        elif length:
            buffer[offset : offset + length].view(array.dtype).copy_(array.reshape(-1))
        offset += length


def unpack_header(buffer: Tensor) -> Header:
    """Read and check what every message has in common. Raises MessageError."""
    if buffer.numel() < HEADER_BYTES:
        raise MessageError(f"a buffer of {buffer.numel()} bytes cannot hold a header of {HEADER_BYTES}")
    head = buffer if buffer.is_cpu else buffer[:HEADER_BYTES].cpu()
    magic, *words = _packed.unpack_from(_HeaderMemory.from_address(head.data_ptr()))
    header = Header(*words)
    if magic != MAGIC or header.kind not in (STEP, ROWS, REPLY, GOODBYE):
        raise MessageError(f"a message with magic {magic:#x} and kind {header.kind} is not of this protocol")
    counts = (header.num_tokens, header.num_rows, header.num_experts, header.capacity_bytes, header.round)
    if min(counts) < 0 or not HEADER_BYTES <= header.num_bytes <= buffer.numel():
        raise MessageError(f"a message announces impossible sizes: {header}")
    return header


def unpack(buffer: Tensor, header: Header, *layout: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Views of the arrays of a message; `layout` is what the reader expects. Raises MessageError."""
    expected = HEADER_BYTES + sum([prod(shape) * dtype.itemsize for shape, dtype in layout])
    if expected != header.num_bytes:
        raise MessageError(f"a message of {header.num_bytes} bytes was expected to have {expected}: {header}")
    return _views(buffer, HEADER_BYTES, layout)


def view_arrays(buffer: Tensor, *layout: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Views of the arrays that `write_arrays` wrote."""
    return _views(buffer, 0, layout)


def _views(
    buffer: Tensor, offset: int, layout: tuple[tuple[tuple[int, ...], torch.dtype], ...]
) -> list[Tensor]:
    arrays: list[Tensor] = []
    for shape, dtype in layout:
        length = prod(shape) * dtype.itemsize
        array = buffer.narrow(0, offset, length).view(dtype)
        arrays.append(array if len(shape) == 1 else array.view(shape))
        offset += length
    return arrays
