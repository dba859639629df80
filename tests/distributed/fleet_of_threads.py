"""A small fleet over real links or groups: expert workers in threads, or in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common import process_group
from common.exchange import Received, link_choice
from common.exchange.collective import CollectiveExpertExchange, CollectiveRouterExchange, join_group
from common.exchange.link_choice import Meeting
from common.exchange.links import LinksExpertExchange, LinksRouterExchange
from common.exchange.routing import RowShape
from common.placement import Placement
from common.process_group import StoreServer
from expert_worker import step_loop

TERM, EPOCH, INCARNATION, JOIN_S = 3, 5, 7, 20.0
HOST = "127.0.0.1"

BACKENDS = {"collective": "gloo", "hccl": "hccl"}
"""Kinds of fleets whose workers form one group with a router, and how their rows travel."""

ExpertEnd = LinksExpertExchange | CollectiveExpertExchange
RouterEnd = LinksRouterExchange | CollectiveRouterExchange
ENDS: dict[str, type[ExpertEnd]] = {
    "links": LinksExpertExchange,
    "sharedMemory": LinksExpertExchange,
    "collective": CollectiveExpertExchange,
    "hccl": CollectiveExpertExchange,
}
"""The kinds of fleets; the router chooses between the first two."""


def meeting(store: StoreServer, prefix: str, same_host: str) -> Meeting:
    """Where one router and one worker meet."""
    return Meeting(store.host, store.port, prefix, JOIN_S, HOST, same_host)


def expert_output(rows: Tensor, expert: int) -> Tensor:
    """What expert `expert` makes of rows [R, D]: exact per row, different for every expert."""
    return (rows.float() * (1.0 + 0.37 * expert) + 0.01 * expert).to(rows.dtype)


def compute(
    experts: tuple[int, ...], received_rows: Tensor, counts: Tensor, row_scales: Tensor | None = None
) -> Tensor:
    """Run each local expert over its rows; int8 rows stand for rows * row_scales."""
    if row_scales is not None:
        received_rows = received_rows.float() * row_scales.unsqueeze(1)
    parts = received_rows.split(counts.tolist())
    outputs = [expert_output(part, expert) for part, expert in zip(parts, experts, strict=True)]
    return torch.cat(outputs) if outputs else received_rows


def add_router(
    exchange: ExpertEnd,
    store: StoreServer,
    rank: int,
    placement: Placement,
    shape: RowShape,
    term: int = TERM,
    epoch: int = EPOCH,
    backend: str = "gloo",
) -> None:
    """Join one router as worker `rank`."""
    experts = placement.experts_of(rank)
    if isinstance(exchange, LinksExpertExchange):
        link = link_choice.join_router(meeting(store, f"w{rank}-{term}-{epoch}", "auto"))
        exchange.add_router(term, epoch, INCARNATION, link, shape, experts)
    else:
        size = placement.ep_size + 1
        group = join_group(store.host, store.port, f"g-{term}-{epoch}", rank + 1, size, JOIN_S, HOST, backend)
        exchange.add_router(term, epoch, INCARNATION, group, shape, experts)


def join_routers(
    stores: list[StoreServer],
    rank: int,
    placement: Placement,
    shape: RowShape,
    delay_s: float,
    kind: str,
    on_closed: Callable[[int, int, str], None],
    is_in_place: bool = False,
) -> tuple[ExpertEnd, Callable[[Received], Tensor]]:
    """Join every router as worker `rank`; return the exchange and what computes for it.

    `is_in_place` has it write into the memory of the reply where that is offered.
    """
    exchange = ENDS[kind](on_closed)
    experts = placement.experts_of(rank)

    def outputs(received: Received) -> Tensor:
        time.sleep(delay_s)
        own, counts = experts[received.layer_id], received.tokens_per_expert
        output = compute(own, received.rows, counts, received.row_scales)
        if not is_in_place or received.output is None:
            return output
        return received.output.copy_(output)

    for number, store in enumerate(stores):
        add_router(exchange, store, rank, placement, shape, TERM + number, EPOCH, BACKENDS.get(kind, ""))
    return exchange, outputs


def worker_process(spec_text: str) -> None:
    """Serve as a worker process until killed; `spec_text` is JSON."""
    spec = json.loads(spec_text)
    torch.set_num_threads(1)
    placement = Placement({int(layer): tuple(map(tuple, own)) for layer, own in spec["layers"].items()})
    dtype, int8_layers = getattr(torch, spec["dtype"]), frozenset(spec["int8_layers"])
    shape = RowShape(spec["hidden_size"], spec["top_k"], dtype, int8_layers)
    stores = [StoreServer(HOST, port, None) for port in spec["ports"]]  # type: ignore[arg-type]
    exchange, outputs = join_routers(
        stores,
        spec["rank"],
        placement,
        shape,
        spec["delay_s"],
        spec["kind"],
        lambda term, epoch, reason: None,
    )
    step_loop.serve(exchange, outputs, lambda: False)


def start_worker(
    store: StoreServer,
    rank: int,
    placement: Placement,
    shape: RowShape,
    delay_s: float,
    kind: str = "links",
) -> subprocess.Popen[bytes]:
    """Start a worker process that joins one router."""
    spec = {
        "ports": [store.port],
        "rank": rank,
        "layers": dict(placement.layers),
        "delay_s": delay_s,
        "kind": kind,
        "hidden_size": shape.hidden_size,
        "top_k": shape.num_experts_per_tok,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "int8_layers": list(shape.int8_layers),
    }
    return subprocess.Popen([sys.executable, "-m", __name__, json.dumps(spec)])


def join_workers(
    store: StoreServer,
    placement: Placement,
    shape: RowShape,
    term: int = TERM,
    kind: str = "links",
    epoch: int = EPOCH,
    **options: object,
) -> RouterEnd:
    """Join every worker as a router."""
    names = [f"w{rank}" for rank in range(placement.ep_size)]
    settings: dict[str, object] = {"floor_s": 5.0, "ask_progress": None, **options}
    common = (names, placement, shape, term, [INCARNATION] * len(names))
    if kind in BACKENDS:
        size = placement.ep_size + 1
        group = join_group(store.host, store.port, f"g-{term}-{epoch}", 0, size, JOIN_S, HOST, BACKENDS[kind])
        return CollectiveRouterExchange(group, *common, **settings)  # type: ignore[arg-type]
    links = [link_choice.join_worker(meeting(store, f"{name}-{term}-{epoch}", kind)) for name in names]
    return LinksRouterExchange(links, *common, **settings)  # type: ignore[arg-type]


class ThreadFleet:
    """Routers and workers of one process, over real links or groups."""

    def __init__(
        self,
        routers: int,
        placement: Placement,
        shape: RowShape,
        kind: str = "links",
        delay_s: float = 0.0,
        watch: Callable[[int, Received], None] | None = None,
        is_in_place: bool = False,
        **options: object,
    ) -> None:
        """`watch` sees, per worker, everything that is computed; `is_in_place` as for `join_routers`."""
        self.watch, self.is_in_place = watch, is_in_place
        self.stores = [process_group.open_store(HOST) for _ in range(routers)]
        self.is_stopped = threading.Event()
        self.closed: list[tuple[int, int, str]] = []
        self.experts: dict[int, ExpertEnd] = {}
        self.threads = [
            threading.Thread(target=self._serve, args=(rank, placement, shape, kind, delay_s), daemon=True)
            for rank in range(placement.ep_size)
        ]
        for thread in self.threads:
            thread.start()
        self.routers = [
            join_workers(store, placement, shape, TERM + i, kind, **options)  # type: ignore[arg-type]
            for i, store in enumerate(self.stores)
        ]

    def _serve(self, rank: int, placement: Placement, shape: RowShape, kind: str, delay_s: float) -> None:
        closed = self.closed
        exchange, outputs = join_routers(
            self.stores,
            rank,
            placement,
            shape,
            delay_s,
            kind,
            lambda term, epoch, reason: closed.append((rank, term, reason)),
            self.is_in_place,
        )
        self.experts[rank] = exchange

        def watched(received: Received) -> Tensor:
            if self.watch is not None:
                self.watch(rank, received)
            return outputs(received)

        step_loop.serve(exchange, watched, self.is_stopped.is_set)

    def close(self) -> None:
        """Stop everything."""
        self.is_stopped.set()
        for router in self.routers:
            router.close()
        for expert in self.experts.values():
            expert.close()
        for thread in self.threads:
            thread.join(5)


if __name__ == "__main__":
    worker_process(sys.argv[1])
