"""A router in this process and expert workers in processes of their own, over the fake HCCL.

An NPU wants one rank a process: torch_npu keeps the communicators of a process in a list that it changes
without a lock, and a rank that registers its window holds Python's lock until its peers do.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from common import process_group
from common.exchange import StepHeader
from common.exchange.collective import CollectiveRouterExchange, join_group
from common.exchange.routing import RowShape
from common.npu_windows import WindowLayout
from common.placement import Placement
from tests.distributed import fleet_of_threads as fleet
from tests.distributed.naive import LAYER, naive

NPU = torch.device("npu")
FLOOR_S = 2.0
JOIN_S = 60.0


@dataclasses.dataclass
class ProcessFleet:
    """A router and its workers; `log` is where the fake CANN writes what is called."""

    router: CollectiveRouterExchange
    workers: list[subprocess.Popen[bytes]]
    log: Path
    step_id: int = 0

    def run(
        self, *parts: tuple[Tensor, ...], level: int = 2, round_rows: int = 0, pass_rows: int = 0
    ) -> list[Tensor]:
        """One step with these micro-batches: all are dispatched, then the last is combined first."""
        self.step_id += 1
        most = max(len(given[0]) for given in parts)
        self.router.begin(
            StepHeader(
                fleet.TERM,
                fleet.EPOCH,
                self.step_id,
                level,
                most,
                micro_batches=len(parts),
                round_rows=round_rows,
                pass_rows=pass_rows,
            )
        )
        flights = [
            self.router.dispatch(LAYER, number, *(one.to(NPU) for one in given))
            for number, given in enumerate(parts)
        ]
        found = [self.router.combine(flight) for flight in reversed(flights)]
        assert {one.device.type for one in found} == {"npu"}
        return [one.cpu() for one in reversed(found)]

    def calls(self) -> list[str]:
        """What was called since this was asked last."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@contextmanager
def process_fleet(
    placement: Placement,
    log: Path,
    shape: RowShape,
    layout: WindowLayout | None = None,
    delays: Sequence[float] = (),
) -> Iterator[ProcessFleet]:
    """A fleet that ends with the block.

    Args:
        layout: asks for windows.
        delays: how many seconds each worker sleeps in a layer; default: none.
    """
    store, size = process_group.open_store(fleet.HOST), placement.ep_size
    workers = [
        fleet.start_worker(store, rank, placement, shape, delays[rank] if delays else 0.0, "hccl")
        for rank in range(size)
    ]
    router = None
    try:
        prefix = f"g-{fleet.TERM}-{fleet.EPOCH}"
        group = join_group(store.host, store.port, prefix, 0, size + 1, JOIN_S, fleet.HOST, "hccl", layout)
        names = [f"w{rank}" for rank in range(size)]
        same = (names, placement, shape, fleet.TERM, [fleet.INCARNATION] * size)
        # Nobody moves while it is waited for, and a dead worker does not answer.
        router = CollectiveRouterExchange(
            group, *same, FLOOR_S, lambda rank: 0 if workers[rank].poll() is None else None
        )
        yield ProcessFleet(router, workers, log)
    finally:
        if router is not None:
            router.close()
        for worker in workers:
            worker.send_signal(signal.SIGCONT)
            worker.kill()
            worker.wait(10)


def assert_naive(found: Sequence[Tensor], parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Every micro-batch has the bits of a naive loop."""
    assert len(found) == len(parts)
    assert all(torch.equal(one, naive(*given)) for one, given in zip(found, parts, strict=True))
