"""Row counts, thread counts and numbers that the kernel tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROW_COUNTS = (*range(1, 65), 127, 128, 129, 513)
THREAD_COUNTS = (1, 2, 3)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_rows(seed: int, count: int, total: int) -> Tensor:  # [count] distinct indices in random order
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def assert_close(actual: Tensor, expected: Tensor, error: float) -> None:
    """Compare with an error relative to the largest value."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(difference) <= error
