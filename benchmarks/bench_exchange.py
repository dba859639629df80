"""Round trip of one MoE layer through the exchange, without experts: every transport, and a bare socket.

`python -m benchmarks.bench_exchange [--workers 2 8 40] [--tokens 1 8 64 512] [--repetitions 200]`
Prints a markdown table; all alternate within one run, and so do the forms that rows travel in at ep_level 2.
Shapes: T tokens, K choices, D hidden_size.
"""

from __future__ import annotations

import argparse
import itertools
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.echo_worker import (
    COLLECTIVE,
    EPOCH,
    HOST,
    INCARNATION,
    JOIN_S,
    LAYERS,
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
INT8, BF16, F32, F64, I64 = 1, 2, 4, 8, 8


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


def message_bytes(level: int, form: str, num_tokens: int, ep_size: int) -> tuple[int, int]:
    """Bytes that must leave the router and come home at one layer."""
    if level == ALL_TO_ALL:
        rows = num_tokens * TOP_K
        sent = HIDDEN_SIZE * INT8 + F32 if form == "int8" else HIDDEN_SIZE * BF16
        return rows * sent, rows * HIDDEN_SIZE * BF16
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


Given = tuple[Tensor, Tensor, Tensor]
"""hidden_states [T, D], topk_ids and topk_weights [T, K]."""


def rows_of(num_tokens: int) -> Given:
    weights, ids = torch.rand(num_tokens, NUM_EXPERTS).topk(TOP_K, dim=1)
    return torch.randn(num_tokens, HIDDEN_SIZE).bfloat16(), ids, weights


def timed_us(work: Callable[[], object]) -> float:
    began_ns = time.monotonic_ns()
    work()
    return (time.monotonic_ns() - began_ns) / 1000


Figures = dict[str, dict[str, list[float]]]
"""Microseconds, by the form of rows and by what carried them."""


class Run:
    """The figures of some lines of the table."""

    def __init__(self, pair: dict[str, RouterExchange], bare: BareSocket, repetitions: int) -> None:
        self._pair, self._bare, self._repetitions = pair, bare, repetitions
        self._steps = dict.fromkeys(pair, 0)

    def measure(self, level: int, forms: list[str], num_tokens: int, ep_size: int) -> Figures:
        """All of one number of tokens; blocks of each form and carrier alternate."""
        given = rows_of(num_tokens)
        figures: Figures = {form: {name: [] for name in (*self._pair, "socket")} for form in forms}
        for block, form in itertools.product(range(BLOCKS + 1), forms):
            count = WARM_UP if block == 0 else self._repetitions // BLOCKS
            size = message_bytes(level, form, num_tokens, ep_size)
            for name in figures[form]:
                work: Callable[[], object] = partial(self._bare.round_trip, *size)
                if name in self._pair:
                    work = self._begin(name, level, LAYERS[form], given)
                times = [timed_us(work) for _ in range(count)]
                figures[form][name] += times if block else []
        return figures

    def _begin(self, name: str, level: int, layer_id: int, given: Given) -> Callable[[], object]:
        """Announce a step and return what takes rows through a layer of it."""
        exchange = self._pair[name]
        self._steps[name] += 1
        exchange.begin(StepHeader(TERM, EPOCH, self._steps[name], level, len(given[0])))
        return lambda: exchange.combine(exchange.dispatch(layer_id, 0, *given))


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
    print(f"| workers | level | tokens | rows | {' | '.join(f'{name} us (p99)' for name in names)} |")
    print("|---|---|---|---|" + "---|" * len(names))
    bare = BareSocket()
    for ep_size in options.workers:
        with exchanges(ep_size, options.transports) as pair:
            run = Run(pair, bare, options.repetitions)
            for level, num_tokens in itertools.product(options.levels, options.tokens):
                forms = [*LAYERS] if level == ALL_TO_ALL else ["bfloat16"]
                for form, figures in run.measure(level, forms, num_tokens, ep_size).items():
                    cells = [
                        f"{statistics.median(figures[name]):.0f} ({percentile_99(figures[name]):.0f})"
                        for name in names
                    ]
                    first = f"| {ep_size} | {level} | {num_tokens} | {form} |"
                    print(f"{first} {' | '.join(cells)} |", flush=True)
    bare.close()


if __name__ == "__main__":
    main()
