"""Who computes with how many threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from common import compute_threads, native_library


@pytest.fixture
def settled() -> Iterator[None]:
    before = torch.get_num_threads()
    if native_library.why_unavailable() is not None:
        pytest.skip("the native kernels were not built")
    compute_threads.settle(3, "cpu")
    yield
    compute_threads._settled = None
    torch.set_num_threads(before)


def test_until_a_process_settles_the_kernels_take_torchs_number() -> None:
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert compute_threads.count() == number
    finally:
        torch.set_num_threads(before)


def test_a_step_of_few_rows_leaves_torch_one_thread_and_the_kernels_all(settled: None) -> None:
    compute_threads.fit_torch(compute_threads.MANY_ROWS - 1)
    assert (torch.get_num_threads(), compute_threads.count()) == (1, 3)
    compute_threads.fit_torch(compute_threads.MANY_ROWS)
    assert (torch.get_num_threads(), compute_threads.count()) == (3, 3)


def test_a_product_has_the_whole_team_and_gives_it_back_even_when_it_fails(settled: None) -> None:
    compute_threads.fit_torch(1)
    seen = []

    def fail() -> None:
        with compute_threads.whole_team():
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (seen, torch.get_num_threads()) == ([3], 1)


def test_an_accelerator_leaves_torch_its_threads(settled: None) -> None:
    compute_threads._settled = None
    compute_threads.settle(2, "npu")
    compute_threads.fit_torch(1)
    assert torch.get_num_threads() == 2
