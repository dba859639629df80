"""The expert workers the router knows: who registered, who is alive, who had which rank. No I/O."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from common.errors import ControlError
from protos import fleet_pb2 as pb

REGISTERED, LOADING, READY, SERVING, LOST = "registered", "loading", "ready", "serving", "lost"
MAX_WORKERS = 4096
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
ADDRESS = re.compile(r"^\S{1,253}:[0-9]{1,5}$")


@dataclass(slots=True)
class Worker:
    """One expert worker, as its last registration and its last heartbeat describe it.

    Attributes:
        ep_rank: its place in the epoch that is prepared or in force; -1 without one.
        missed: heartbeats missed in a row.
        stopped: heartbeats in a row that found its executor stopped.
    """

    worker_id: str
    incarnation: int
    address: str
    device: str
    arithmetic: str
    order: int
    state: str = REGISTERED
    ep_rank: int = -1
    num_local_experts: int = 0
    loaded_bytes: int = 0
    total_bytes: int = 0
    missed: int = 0
    stopped: int = 0
    failures: int = 0
    grouped_matmul: str = ""
    transport: str = ""
    heard_s: float = field(default_factory=time.monotonic)

    @property
    def is_alive(self) -> bool:
        """Whether it can be a member of the next epoch."""
        return self.state != LOST


class Fleet:
    """All workers by worker_id. Owned by the event loop."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.ranks: dict[str, int] = {}
        self._order = 0

    def register(self, request: pb.RegisterRequest) -> tuple[Worker, bool]:
        """Take in a worker; say whether this start of it is new.

        Raises:
            ControlError: the introduction makes no sense.
        """
        _check(request)
        known = self.workers.get(request.worker_id)
        if known is None and len(self.workers) >= MAX_WORKERS:
            raise ControlError(
                f"{MAX_WORKERS} expert workers are registered already: there is no room for more"
            )
        is_new = known is None or known.incarnation != request.incarnation or not known.is_alive
        if known is not None and not is_new:
            known.address, known.heard_s, known.missed = request.address, time.monotonic(), 0
            return known, False
        self._order += 1
        worker = Worker(
            request.worker_id,
            request.incarnation,
            request.address,
            request.device,
            request.arithmetic,
            order=known.order if known is not None else self._order,
            failures=known.failures if known is not None else 0,
        )
        self.workers[worker.worker_id] = worker
        return worker, True

    def assign(self, members: tuple[str, ...]) -> list[Worker]:
        """Give ranks to the members of the next epoch, and remember them for workers that return."""
        for worker in self.workers.values():
            worker.ep_rank = -1
            if worker.state in (SERVING, READY, LOADING):
                worker.state = REGISTERED
        self.ranks = {name: rank for name, rank in self.ranks.items() if rank >= len(members)}
        for ep_rank, name in enumerate(members):
            self.ranks[name] = ep_rank
            self.workers[name].ep_rank = ep_rank
        return [self.workers[name] for name in members]

    def by_rank(self, ep_rank: int) -> Worker | None:
        """The worker that holds a rank now."""
        return next((worker for worker in self.workers.values() if worker.ep_rank == ep_rank), None)

    def arithmetics(self) -> set[str]:
        """The different arithmetics of the workers that are alive."""
        return {worker.arithmetic for worker in self.workers.values() if worker.is_alive}


def _check(request: pb.RegisterRequest) -> None:
    if not NAME.match(request.worker_id):
        raise ControlError(
            f"worker_id is {request.worker_id!r}, but it must be 1 to 128 letters, digits, dots, dashes or "
            "underscores and start with a letter or digit"
        )
    if not ADDRESS.match(request.address):
        raise ControlError(f"address is {request.address!r}, but it must be HOST:PORT")
