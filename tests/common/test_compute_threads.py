"""Who computes with how many threads."""

from __future__ import annotations

import os
import subprocess
import sys
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


SLEEPING = """
import os, time
from pathlib import Path
import torch
from common import compute_threads, int8_rows

def sleeps():
    counts = {}
    for task in Path("/proc/self/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        counts[int(task.name)] = int(lines["voluntary_ctxt_switches"])
    return counts

compute_threads.settle(3, "cpu")
compute_threads.fit_torch(1)  # the only threads that are made are helpers
rows = torch.randn(1000, 1000)  # so many that they are shared
others = set(sleeps())
expected, scales = int8_rows.quantize_rows(rows)
compute_threads.sleep_at_once()
time.sleep(0.1)
before = sleeps()
for pause_s in [0.0] * 200 + [0.001] * 50:
    time.sleep(pause_s)
    found, found_scales = int8_rows.quantize_rows(rows)
    assert torch.equal(found, expected) and torch.equal(found_scales, scales)
time.sleep(0.1)
print(*(after - before[task] for task, after in sleeps().items() if task not in others))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
@pytest.mark.skipif(native_library.why_unavailable() is not None, reason="the kernels were not built")
def test_helpers_that_sleep_at_once_are_woken_for_what_follows() -> None:
    command = [sys.executable, "-c", SLEEPING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    times_woken = [int(word) for word in done.stdout.split()]
    assert len(times_woken) == 2
    assert min(times_woken) > 0


PLACED = """
import os, sys, threading
from pathlib import Path
import torch
from common import compute_threads, int8_rows

def compute():
    int8_rows.quantize_rows(torch.ones(1000, 1000))  # so many that they are shared

def cores():
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    return {task: sorted(os.sched_getaffinity(task)) for task in tasks}

first, number, is_late = map(int, sys.argv[1:])
compute_threads.settle(number, "cpu")
if is_late:
    compute()
compute_threads.take_cores(first)
compute()
# It stays: a thread that ends may be listed and gone when it is asked.
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
found = cores()
kept = sorted(own for own in found.values() if len(own) == 1)
print(found[os.getpid()], found[thread.native_id], kept, sep=";")
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
@pytest.mark.skipif(native_library.why_unavailable() is not None, reason="the kernels were not built")
@pytest.mark.parametrize("is_late", [False, True], ids=["before the first work", "between work"])
def test_helpers_keep_a_core_each_and_whoever_has_them_work_may_use_all(is_late: bool) -> None:
    cores = sorted(os.sched_getaffinity(0))

    def placed(first: int, number: int) -> list[str]:
        command = [sys.executable, "-c", PLACED, str(first), str(number), str(int(is_late))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip().split(";")

    for first in range(3):
        others = [[core] for core in cores if core != cores[first % len(cores)]]
        assert placed(first, len(cores)) == [str(cores), str(cores), str(others)]
    # With fewer threads than cores the system has a choice that is better left to it.
    assert placed(0, len(cores) - 1) == [str(cores), str(cores), "[]"]
