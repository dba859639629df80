"""One int8 linear in the shapes of a DeepSeek-V2-Lite expert: the native kernel beside what else there is.

`OMP_WAIT_POLICY=passive python -m benchmarks.bench_int8 [--rows 1 2 4 8] [--threads 2] [--repetitions 200]`
Prints a markdown table of medians; p99 is the 99th percentile. The four alternate call by call, each on the
next of many copies of its weight, so that none finds it in a cache. `read` adds up the bytes of the native
kernel's weight with torch.
Shapes: M rows, K in-features, N out-features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import native_int8, native_library
from common.native_int8 import NativeInt8

SHAPES = ((2816, 2048), (2048, 1408))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COPIES_BYTES = 160_000_000
WARM_UP = 3
ZERO_POINT = 128

Call = Callable[[int], object]
"""Multiplies by copy i of the weight."""


class Contest:
    """The same weight, many times, for each of those who multiply by it."""

    def __init__(self, kernel: NativeInt8, num_out: int, num_in: int) -> None:
        self._kernel = kernel
        self.num_copies = -(-COPIES_BYTES // (num_out * num_in))
        weight = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8)
        scale = torch.rand(num_out) / 1000
        copies = range(self.num_copies)
        self._native = [kernel.pack_int8(weight, scale) for _ in copies]
        self._flat = [packed.parts[0].view(torch.int64) for packed in self._native]
        self._onednn = [torch.ops.onednn.qlinear_prepack(weight, [16, num_in]) for _ in copies]
        self._bfloat16 = [(weight * scale.unsqueeze(1)).bfloat16() for _ in copies]
        self._scale, self._offsets = scale, torch.zeros(num_out, dtype=torch.int64)
        self._num_in = num_in

    def calls(self, num_rows: int) -> dict[str, Call]:
        """Everybody, by name."""
        x = torch.randn(num_rows, self._num_in)
        rows, row_scales = self._kernel.quantize_rows(x)
        narrow = x.bfloat16()
        return {
            "native": lambda i: self._kernel.int8_linear(rows, row_scales, self._native[i]),
            "read": lambda i: self._flat[i].sum(),
            "oneDNN": lambda i: self._multiply_onednn(rows, row_scales, i),
            "bfloat16": lambda i: F.linear(narrow, self._bfloat16[i]),
        }

    def _multiply_onednn(self, rows: Tensor, row_scales: Tensor, i: int) -> Tensor:
        unsigned = rows.view(torch.uint8) ^ ZERO_POINT
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(unsigned, 1.0, ZERO_POINT, self._onednn[i], self._scale, self._offsets, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return product * row_scales.unsqueeze(1)


def times_us(calls: dict[str, Call], num_copies: int, repetitions: int) -> dict[str, list[float]]:
    """Call everybody in turn, and return how long each call took, sorted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repetitions + WARM_UP):
        for turn, (name, call) in enumerate(calls.items()):
            # Not the copy that somebody else has just read: two of them read the same memory.
            copy = (i + turn * num_copies // len(calls)) % num_copies
            began_ns = time.perf_counter_ns()
            call(copy)
            times[name].append((time.perf_counter_ns() - began_ns) / 1000)
    return {name: sorted(values[WARM_UP:]) for name, values in times.items()}


def line(num_out: int, num_in: int, num_rows: int, times: dict[str, list[float]]) -> Sequence[str]:
    """The cells of one row of the table."""
    us = {name: statistics.median(values) for name, values in times.items()}
    slow = times["native"][int(len(times["native"]) * 0.99)]
    weights, products = num_out * num_in, 2 * num_out * num_in * num_rows
    return (
        *(f"{num_out} x {num_in}", str(num_rows)),
        *(
            f"{us['native']:.0f} ({slow:.0f})",
            f"{weights / us['native'] / 1000:.1f}",
            f"{products / us['native'] / 1000:.0f}",
        ),
        *(f"{us['read']:.0f}", f"{us['native'] / us['read']:.2f}"),
        *(f"{us['oneDNN']:.0f}", f"{products / us['oneDNN'] / 1000:.0f}"),
        *(f"{us['bfloat16']:.0f}", f"{products / us['bfloat16'] / 1000:.0f}"),
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=200)
    paths = native_library.available_paths()
    parser.add_argument("--path", choices=paths, default=paths[-1])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    titles = (
        *("shape", "rows", "native us (p99)", "GB/s", "GOP/s", "read us", "native / read"),
        *("oneDNN us", "GOP/s", "bfloat16 us", "GFLOP/s"),
    )
    kernel = native_int8.load(path=options.path)
    print(f"path {options.path}, {options.threads} threads")
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for num_out, num_in in SHAPES:
        contest = Contest(kernel, num_out, num_in)
        for num_rows in options.rows:
            times = times_us(contest.calls(num_rows), contest.num_copies, options.repetitions)
            print(f"| {' | '.join(line(num_out, num_in, num_rows, times))} |", flush=True)


if __name__ == "__main__":
    main()
