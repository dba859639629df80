"""One bfloat16 linear in shapes of DeepSeek-V2-Lite: the native kernel beside torch's operator.

`OMP_WAIT_POLICY=passive python -m benchmarks.bench_bf16 [--rows 1 2 4 8] [--threads 2] [--repetitions 200]`
Prints a markdown table as `bench_int8` does, and in its way. `read` adds up the weight's bytes with torch.
Shapes: M rows, K in-features, N out-features.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from benchmarks.bench_int8 import COPIES_BYTES, Call, times_us
from common import native_bf16

SHAPES = ((2816, 2048), (2048, 1408), (576, 2048))
"""An expert's two products, and kv_a_proj_with_mqa."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def contest(num_out: int, num_in: int, num_rows: int, num_copies: int) -> dict[str, Call]:
    """Make everybody's call, by name; all read the same copies of a weight."""
    weight = (torch.randn(num_out, num_in) / num_in**0.5).bfloat16()
    copies = [weight.clone() for _ in range(num_copies)]
    flat = [copy.view(torch.int64) for copy in copies]
    x = torch.randn(num_rows, num_in).bfloat16()
    kernel = native_bf16.load()
    return {
        "native": lambda i: kernel.linear(x, copies[i]),
        "read": lambda i: flat[i].sum(),
        "torch": lambda i: F.linear(x, copies[i]),
    }


def line(num_out: int, num_in: int, num_rows: int, times: dict[str, list[float]]) -> Sequence[str]:
    """The cells of one row of the table."""
    us = {name: statistics.median(values) for name, values in times.items()}
    slow = times["native"][int(len(times["native"]) * 0.99)]
    num_bytes, products = 2 * num_out * num_in, 2 * num_out * num_in * num_rows
    return (
        *(f"{num_out} x {num_in}", str(num_rows)),
        *(
            f"{us['native']:.0f} ({slow:.0f})",
            f"{num_bytes / us['native'] / 1000:.1f}",
            f"{products / us['native'] / 1000:.0f}",
        ),
        *(f"{us['read']:.0f}", f"{us['native'] / us['read']:.2f}"),
        *(f"{us['torch']:.0f}", f"{products / us['torch'] / 1000:.0f}"),
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=200)
    options = parser.parse_args()
    why = native_bf16.why_unavailable()
    if why is not None:
        parser.error(f"{why}: there is nothing to compare")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    titles = (
        *("shape", "rows", "native us (p99)", "GB/s", "GFLOP/s", "read us", "native / read"),
        *("torch us", "GFLOP/s"),
    )
    print(f"{options.threads} threads")
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    for num_out, num_in in SHAPES:
        num_copies = max(2, -(-COPIES_BYTES // (2 * num_out * num_in)))
        for num_rows in options.rows:
            calls = contest(num_out, num_in, num_rows, num_copies)
            times = times_us(calls, num_copies, options.repetitions)
            print(f"| {' | '.join(line(num_out, num_in, num_rows, times))} |", flush=True)


if __name__ == "__main__":
    main()
