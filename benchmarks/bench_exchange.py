"""Round trip of one MoE layer through the exchange, without experts: every transport, and a bare socket.

`python -m benchmarks.bench_exchange [--workers 2 8 40] [--tokens 1 8 64 512] [--repetitions 200]`
Prints a markdown table; all alternate within one run. Shapes: T tokens, K choices, D hidden_size.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.echo_worker import (
    COLLECTIVE,
    EPOCH,
    HOST,
    INCARNATION,
    JOIN_S,
    LAYER,
    LINKED,
    TERM,
    Bench,
    start,
)
from common import process_group
from common.exchange import ALL_GATHER, ALL_TO_ALL, RouterExchange, StepHeader, link_choice
from common.exchange.collective import CollectiveRouterExchange, join_group
from common.exchange.links import LinksRouterExchange

HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 2048, 6, 64
TRANSPORTS = (*LINKED, COLLECTIVE)
BLOCKS = 10
WARM_UP = 20
SIZES = struct.Struct("<QQ")
BF16, F32, F64, I64 = 2, 4, 8, 8


class BareSocket:
    """A process at the other end of a socket pair that answers n bytes with m."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", "from benchmarks.bench_exchange import echo; echo()"]
            self._process = subprocess.Popen(command, stdin=theirs.fileno())

    def round_trip(self, sent: int, received: int) -> None:
        self._socket.sendall(SIZES.pack(sent, received) + bytes(sent))
        drain(self._socket, received)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def drain(end: socket.socket, count: int) -> None:
    buffer = memoryview(bytearray(1 << 20))
    while count:
        got = end.recv_into(buffer[: min(count, len(buffer))])
        if not got:
            raise EOFError
        count -= got


def echo() -> None:
    """Answer until the pair is closed."""
    end = socket.socket(fileno=0)
    while header := end.recv(SIZES.size, socket.MSG_WAITALL):
        sent, received = SIZES.unpack(header)
        drain(end, sent)
        end.sendall(bytes(received))


def message_bytes(level: int, num_tokens: int, ep_size: int) -> tuple[int, int]:
    """Bytes that must leave the router and come home at one layer."""
    if level == ALL_TO_ALL:
        rows = num_tokens * TOP_K * HIDDEN_SIZE * BF16
        return rows, rows
    per_token = TOP_K * (I64 + F32) + HIDDEN_SIZE * BF16
    return ep_size * num_tokens * per_token, ep_size * num_tokens * HIDDEN_SIZE * F64


@contextmanager
def exchanges(ep_size: int, transports: Sequence[str] = TRANSPORTS) -> Iterator[dict[str, RouterExchange]]:
    """An exchange for each transport, with the same workers."""
    store = process_group.open_store(HOST)
    bench = Bench(store.port, ep_size, max(NUM_EXPERTS, ep_size), TOP_K, HIDDEN_SIZE, transports)
    children = [start(bench, ep_rank) for ep_rank in range(ep_size)]
    try:
        links = {
            transport: [
                link_choice.join_worker(bench.meeting(ep_rank, transport)) for ep_rank in range(ep_size)
            ]
            for transport in LINKED
            if transport in transports
        }
        names, incarnations = [f"w{rank}" for rank in range(ep_size)], [INCARNATION] * ep_size
        facts = (names, bench.placement, bench.shape, TERM, incarnations, 60.0, None)
        made: dict[str, RouterExchange] = {
            transport: LinksRouterExchange(joined, *facts) for transport, joined in links.items()
        }
        if COLLECTIVE in transports:
            group = join_group(HOST, store.port, "group", 0, 1 + ep_size, JOIN_S, HOST)
            made[COLLECTIVE] = CollectiveRouterExchange(group, *facts)
        yield made
    finally:
        for child in children:
            child.kill()
            child.wait(10)


def rows_of(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = torch.rand(num_tokens, NUM_EXPERTS).topk(TOP_K, dim=1)
    return torch.randn(num_tokens, HIDDEN_SIZE).bfloat16(), ids, weights


def timed_us(work: Callable[[], object]) -> float:
    began_ns = time.monotonic_ns()
    work()
    return (time.monotonic_ns() - began_ns) / 1000


class Run:
    """The figures of one line of the table."""

    def __init__(self, pair: dict[str, RouterExchange], bare: BareSocket, repetitions: int) -> None:
        self._pair, self._bare, self._repetitions = pair, bare, repetitions
        self._steps = dict.fromkeys(pair, 0)

    def measure(self, level: int, num_tokens: int, ep_size: int) -> dict[str, list[float]]:
        """Microseconds per repetition, by name; blocks of each alternate."""
        given = rows_of(num_tokens)
        figures: dict[str, list[float]] = {name: [] for name in (*self._pair, "socket")}
        size = message_bytes(level, num_tokens, ep_size)
        for block in range(BLOCKS + 1):
            count = WARM_UP if block == 0 else self._repetitions // BLOCKS
            for name, exchange in self._pair.items():
                self._steps[name] += 1
                exchange.begin(StepHeader(TERM, EPOCH, self._steps[name], level, num_tokens))
                times = [timed_us(lambda: self._layer(exchange, given)) for _ in range(count)]  # noqa: B023
                figures[name] += times if block else []
            times = [timed_us(lambda: self._bare.round_trip(*size)) for _ in range(count)]
            figures["socket"] += times if block else []
        return figures

    def _layer(self, exchange: RouterExchange, given: tuple[Tensor, Tensor, Tensor]) -> None:
        exchange.combine(exchange.dispatch(LAYER, 0, *given))


def percentile_99(values: list[float]) -> float:
    return sorted(values)[min(int(len(values) * 0.99), len(values) - 1)]


@torch.inference_mode()  # as in the services
def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 40])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--levels", type=int, nargs="+", default=[ALL_GATHER, ALL_TO_ALL])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = (*options.transports, "socket")
    print(f"| workers | level | tokens | {' | '.join(f'{name} us (p99)' for name in names)} |")
    print("|---|---|---|" + "---|" * len(names))
    bare = BareSocket()
    for ep_size in options.workers:
        with exchanges(ep_size, options.transports) as pair:
            run = Run(pair, bare, options.repetitions)
            for level in options.levels:
                for num_tokens in options.tokens:
                    figures = run.measure(level, num_tokens, ep_size)
                    cells = [
                        f"{statistics.median(figures[name]):.0f} ({percentile_99(figures[name]):.0f})"
                        for name in names
                    ]
                    print(f"| {ep_size} | {level} | {num_tokens} | {' | '.join(cells)} |", flush=True)
    bare.close()


if __name__ == "__main__":
    main()
