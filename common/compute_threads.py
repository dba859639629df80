"""How many threads compute: those of the native kernels, and torch's own beside them.

Both would have a team for the same cores. To wake torch's between two kernels, for an element-wise operation
of some microseconds, takes longer than it saves, and keeps the kernels' helpers from their core. Where the
kernels are there, torch therefore computes alone, but for products of float weights and steps of many rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common import native_library

MANY_ROWS = 128
"""Rows from which on torch's team gains more than it costs in whatever a step has torch do."""

_settled: int | None = None


def count() -> int:
    """Threads that compute in this process, the caller among them."""
    return torch.get_num_threads() if _settled is None else _settled


def settle(number: int | None, device: str) -> None:
    """Compute with `number` threads from here on; None: as many as torch has found."""
    global _settled  # noqa: PLW0603 - the number belongs to the process, as torch's own does
    if number is not None:
        torch.set_num_threads(number)
    if device == "cpu" and native_library.why_unavailable() is None:
        _settled = torch.get_num_threads()


def take_cores(first: int) -> None:
    """Have each thread of the native kernels compute on a core of its own.

    For processes that share the cores of a machine and have a thread for every core each, which is checked
    here: where two threads of one of them met on a core, another would have nothing to do for a while.

    Args:
        first: which core whoever has the kernels work takes; different ones in processes that work together.
    """
    if _settled is not None and hasattr(os, "sched_getaffinity") and _settled == len(os.sched_getaffinity(0)):
        native_library.open_library().threads_place(first)


def sleep_at_once() -> None:
    """Have the helpers of the native kernels sleep as soon as they find nothing to do.

    For a process that computes one message at a time. They look for work for a while otherwise, since kernels
    follow one another, and keep the cores meanwhile from whoever else computes there.
    """
    if native_library.why_unavailable() is None:
        native_library.open_library().threads_look(0)


def fit_torch(num_rows: int) -> None:
    """Give torch the threads that pay for operations on so many rows."""
    if _settled is None:
        return
    number = _settled if num_rows >= MANY_ROWS else 1
    if number != torch.get_num_threads():  # to set it takes longer than to ask
        torch.set_num_threads(number)


@contextmanager
def whole_team() -> Iterator[None]:
    """Have torch use every thread for one product, whose weight takes long to read."""
    before = torch.get_num_threads()
    if before == count():
        yield
        return
    torch.set_num_threads(count())
    try:
        yield
    finally:
        torch.set_num_threads(before)
