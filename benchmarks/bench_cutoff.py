"""Peak memory of one expert worker at ep_level 1, with and without the routing cutoff.

`python -m benchmarks.bench_cutoff [--tokens 65000] [--factors 1.0 0.25 0.05]`
One worker of eight (DeepSeek-V3's shape, hidden 2048 unless said otherwise, bfloat16) takes all tokens of a
router; its experts are replaced by the identity, so that what is measured is rows and sums. A process of its
own for each line, so that each has its own peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from common.exchange.token_passes import TokenPasses
from common.row_limits import RowLimits

N_ROUTED_EXPERTS, TOP_K, EP_SIZE = 256, 8, 8
MIB = 1 << 20


def measure(num_tokens: int, hidden_size: int, factor: float) -> None:
    """Take all tokens in passes; print passes, most rows at once, peak MiB beyond the input, seconds."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(num_tokens, N_ROUTED_EXPERTS, generator=generator).topk(TOP_K, dim=1).indices
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    hidden_states = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16)
    limits = RowLimits(TOP_K, EP_SIZE, cutoff_factor=factor)
    before = peak_bytes()
    began_s = time.monotonic()
    num_local = N_ROUTED_EXPERTS // EP_SIZE
    passes = TokenPasses(hidden_states, keys, weights, 0, num_local, limits.pass_rows(num_tokens))
    most = 0
    while True:
        rows = passes.expand().rows
        most = max(most, rows.shape[0])
        if passes.take(rows):
            break
    seconds = time.monotonic() - began_s
    print(
        f"| {num_tokens} | {factor:g} | {passes.num_passes} | {most} | {(peak_bytes() - before) / MIB:.0f} "
        f"| {seconds:.2f} |",
        flush=True,
    )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    """Print a markdown table, one process per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65000)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 0.25, 0.1, 0.05, 0.01])
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.tokens, options.hidden_size, options.one)
        return
    print("| tokens | factor | passes | most rows at once | peak MiB beyond the input | s |")
    print("|---|---|---|---|---|---|", flush=True)
    for factor in options.factors:
        shape = ("--tokens", str(options.tokens), "--hidden-size", str(options.hidden_size))
        command = [sys.executable, "-m", "benchmarks.bench_cutoff", *shape, "--one", str(factor)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
