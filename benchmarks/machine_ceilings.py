"""What this machine can do at most, right now: read memory, multiply int8, multiply bfloat16.

`python -m benchmarks.machine_ceilings [--threads 2]` prints one line of JSON. Other guests of a host change
these from minute to minute: a speed is worth something beside the ceilings of the same minute only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.bench_int8 import Contest, times_us
from common import native_int8

READ_BYTES = 512 << 20
READS = 9
PRODUCTS = 15
ROWS, IN_FEATURES, OUT_FEATURES = 512, 2048, 2816


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of a machine.

    Attributes:
        read_gb_s: bytes that a sum over a large buffer reads, in 10^9 a second.
        int8_gop_s: 10^9 int8 operations a second, of the faster of the native kernel and oneDNN on many rows;
            an addition and a multiplication are two.
        bfloat16_gflop_s: the same of torch's bfloat16 linear.
    """

    read_gb_s: float
    int8_gop_s: float
    bfloat16_gflop_s: float


def measure(threads: int) -> Ceilings:
    """Measure all of them with so many threads; takes some seconds and 2 GB."""
    torch.set_num_threads(threads)
    operations = 2 * ROWS * IN_FEATURES * OUT_FEATURES
    read_gb_s = _read_gb_s()
    contest = Contest(native_int8.load(), OUT_FEATURES, IN_FEATURES)
    calls = contest.calls(ROWS)
    del calls["read"]
    times = times_us(calls, contest.num_copies, PRODUCTS)
    speeds = {name: operations / statistics.median(us) / 1000 for name, us in times.items()}
    return Ceilings(read_gb_s, max(speeds["native"], speeds["oneDNN"]), speeds["bfloat16"])


def _read_gb_s() -> float:
    buffer = torch.zeros(READ_BYTES // 4)
    seconds = []
    for _ in range(READS):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / statistics.median(seconds) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(asdict(measure(parser.parse_args().threads))))


if __name__ == "__main__":
    main()
