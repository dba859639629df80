"""Which replica of an expert serves a row: decided by what the row is, so that a replay asks the same one.

Numbers stay below 2**32 and products below 2**59: the functions take Python's integers, or int64 tensors of
any shapes that broadcast, and give the same choice for both.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

MASK = (1 << 32) - 1

Integers = TypeVar("Integers", int, "Tensor")


def request_key(request_id: str) -> int:
    """A number in [0, 2**32) for a request, the same in every process, machine and version."""
    digest = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def row_key(request: Integers, position: Integers, layer_id: int) -> Integers:
    """A number in [0, 2**32) for a token in a layer; `request` is its request_key."""
    return mix(mix(mix(request) ^ (position & MASK)) ^ (layer_id & MASK))


def replica_of(row: Integers, num_replicas: Integers) -> Integers:
    """The replica of an expert, counted from 0, that serves a row; `row` is its row_key."""
    return row % num_replicas


def mix(value: Integers) -> Integers:
    """Spread numbers of [0, 2**32) over that range, one to one.

    The 32-bit integer hash of Thomas Mueller: both multipliers are small enough for int64.
    """
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & MASK
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & MASK
    return value ^ (value >> 16)
