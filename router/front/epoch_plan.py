"""Which workers form the next epoch. Pure: a snapshot in, a decision out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that is alive.

    Attributes:
        order: who registered first.
        seats: the ranks that the rank table has for it, in order; empty without a table.
    """

    worker_id: str
    order: int
    seats: tuple[int, ...] = ()


def plan_members(
    candidates: Iterable[Candidate], ranks: Mapping[str, int], world_size: int
) -> tuple[str, ...] | None:
    """Choose the members of the next epoch by ep_rank; None where there are too few.

    A worker that had a rank gets it back. The others fill what is left: without a rank table first come,
    first served; with one, each only the ranks the table has for it, and those of one server in the order of
    their names, whoever came first.

    Args:
        candidates: the workers that are alive.
        ranks: the rank each worker had last; a rank stands there at most once.
        world_size: ranks in the group.
    """
    by_order = sorted(candidates, key=lambda candidate: (candidate.order, candidate.worker_id))
    # Who can have one rank only has it before others who could have another one.
    by_claim = sorted(by_order, key=lambda candidate: len(candidate.seats) != 1)
    places: dict[int, str] = {}
    for candidate in by_claim:
        rank = candidate.seats[0] if len(candidate.seats) == 1 else ranks.get(candidate.worker_id)
        if rank is not None and rank < world_size and rank in (candidate.seats or (rank,)):
            places.setdefault(rank, candidate.worker_id)
    seated = set(places.values())
    newcomers = [candidate for candidate in by_order if candidate.worker_id not in seated]
    for candidate in sorted(newcomers, key=_by_name_at_a_table):
        free = (rank for rank in candidate.seats or range(world_size) if rank not in places)
        if (rank := next(free, None)) is not None:
            places[rank] = candidate.worker_id
    if len(places) < world_size:
        return None
    return tuple(places[rank] for rank in range(world_size))


def missing_sentence(num_alive: int, world_size: int) -> str:
    """Say how many workers the next epoch waits for."""
    missing = world_size - num_alive
    return f"{num_alive} of {world_size} expert workers are registered; waiting for {missing} more"


def _by_name_at_a_table(candidate: Candidate) -> list[tuple[int, str]]:
    """worker-2 before worker-10 where a rank table seats them; else nothing, which keeps the order."""
    if not candidate.seats:
        return []
    parts = re.split(r"([0-9]+)", candidate.worker_id)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
