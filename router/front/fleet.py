"""The expert workers the router knows: who registered, who is alive, who had which rank. No I/O."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import ConfigError, ControlError, NotReady
from common.rank_seats import seats_of
from common.rank_table import RankTable
from protos import fleet_pb2 as pb

REGISTERED, LOADING, READY, SERVING, LOST = "registered", "loading", "ready", "serving", "lost"
MAX_WORKERS = 4096
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
ADDRESS = re.compile(r"^\S{1,253}:[0-9]{1,5}$")


@dataclass(slots=True)
class Worker:
    """One expert worker, as its last registration and its last heartbeat describe it.

    Attributes:
        device_id: the number of its device on its server; None where nobody knows.
        seats: the ranks that the rank table has for it; empty without a table.
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
    device_id: int | None = None
    seats: tuple[int, ...] = ()
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

    def __init__(self, table: RankTable | None = None) -> None:
        """`table` says which worker gets which rank; without one, those who come first fill the ranks."""
        self.table = table
        self.workers: dict[str, Worker] = {}
        self.ranks: dict[str, int] = {}
        self._order = 0

    def register(self, request: pb.RegisterRequest) -> tuple[Worker, bool]:
        """Take in a worker; say whether this start of it is new.

        Raises:
            ControlError: the introduction makes no sense, or the rank table does not know the worker.
            NotReady: others have all the ranks that the table has for it.
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
        seats = self._seats(request)
        self._order += 1
        worker = Worker(
            request.worker_id,
            request.incarnation,
            request.address,
            request.device,
            request.arithmetic,
            order=known.order if known is not None else self._order,
            device_id=request.device_id if request.HasField("device_id") else None,
            seats=seats,
            failures=known.failures if known is not None else 0,
        )
        self.workers[worker.worker_id] = worker
        return worker, True

    def assign(self, members: tuple[str, ...], ranks: tuple[int, ...]) -> list[Worker]:
        """Number the members of the next epoch, and remember their ranks for workers that return.

        Args:
            members: worker_ids by ep_rank.
            ranks: by ep_rank, the rank in the whole group.
        """
        for worker in self.workers.values():
            worker.ep_rank = -1
            if worker.state in (SERVING, READY, LOADING):
                worker.state = REGISTERED
        self.ranks = {name: rank for name, rank in self.ranks.items() if rank not in ranks}
        for ep_rank, (name, rank) in enumerate(zip(members, ranks, strict=True)):
            self.ranks[name] = rank
            self.workers[name].ep_rank = ep_rank
        return self.named(members)

    def _seats(self, request: pb.RegisterRequest) -> tuple[int, ...]:
        """The ranks that the table has for a worker; empty without a table."""
        if self.table is None:
            return ()
        device = request.device_id if request.HasField("device_id") else None
        try:
            seats = seats_of(self.table, {host_of(request.address), request.data_address} - {""}, device)
        except ConfigError as error:
            raise ControlError(f"expert worker {request.worker_id} is refused: {error}") from None
        others = [one for one in self.workers.values() if one.is_alive and one.worker_id != request.worker_id]
        rivals = [one.worker_id for one in others if set(one.seats) <= set(seats)]
        if len(rivals) >= len(seats):
            taken = "rank" if len(seats) == 1 else "ranks"
            raise NotReady(
                f"the rank table has {taken} {', '.join(map(str, seats))} for expert worker "
                f"{request.worker_id}, and {', '.join(sorted(rivals))} came first: end one of them",
                "NO_RANK_FREE",
            )
        return seats

    def named(self, names: tuple[str, ...]) -> list[Worker]:
        """The workers of these names, in their order."""
        return [self.workers[name] for name in names]

    def has(self, workers: Iterable[Worker]) -> bool:
        """Whether these starts of these workers are all alive."""
        return all(self.workers.get(one.worker_id) is one and one.is_alive for one in workers)

    def by_rank(self, ep_rank: int) -> Worker | None:
        """The worker that holds a rank now."""
        return next((worker for worker in self.workers.values() if worker.ep_rank == ep_rank), None)

    def arithmetics(self) -> set[str]:
        """The different arithmetics of the workers that are alive."""
        return {worker.arithmetic for worker in self.workers.values() if worker.is_alive}


def host_of(address: str) -> str:
    """The host of HOST:PORT."""
    return address.rpartition(":")[0].strip("[]")


def _check(request: pb.RegisterRequest) -> None:
    if not NAME.match(request.worker_id):
        raise ControlError(
            f"worker_id is {request.worker_id!r}, but it must be 1 to 128 letters, digits, dots, dashes or "
            "underscores and start with a letter or digit"
        )
    if not ADDRESS.match(request.address):
        raise ControlError(f"address is {request.address!r}, but it must be HOST:PORT")
