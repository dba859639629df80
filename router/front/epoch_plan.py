"""Which workers form the next epoch. Pure: a snapshot in, a decision out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.placement import Placement
from common.rank_table import RankTable

MOST_NAMED = 4
"""Ranks that a sentence names."""


@dataclass(frozen=True, slots=True)
class Seating:
    """Who the members of an epoch are, and what each of them holds.

    Attributes:
        members: worker_ids by ep_rank.
        ranks: by ep_rank, the rank in the whole group.
        placement: of the members.
    """

    members: tuple[str, ...]
    ranks: tuple[int, ...]
    placement: Placement


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


def place_workers(
    candidates: Iterable[Candidate], ranks: Mapping[str, int], world_size: int
) -> dict[int, str]:
    """Give the ranks of the next epoch to workers: ep_rank -> worker_id. A rank may stay without one.

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
    return places


def seat_all(places: Mapping[int, str], placement: Placement) -> Seating | None:
    """The members of an epoch of the whole group; None while a rank has no worker."""
    if len(places) < placement.ep_size:
        return None
    ranks = tuple(range(placement.ep_size))
    return Seating(tuple(places[rank] for rank in ranks), ranks, placement)


def seat_survivors(
    places: Mapping[int, str], holders: Mapping[str, int], placement: Placement
) -> Seating | None:
    """The members of an epoch of those who need not load; None where nobody of them holds some expert.

    Args:
        places: ep_rank -> worker_id, of the workers that are alive.
        holders: the rank of the whole group whose experts a worker has in memory.
        placement: of the whole group.
    """
    ranks = tuple(sorted(rank for rank, name in places.items() if holders.get(name) == rank))
    left = placement.of_ranks(ranks)
    if not ranks or not left.covers(placement):
        return None
    return Seating(tuple(places[rank] for rank in ranks), ranks, left)


def missing_sentence(places: Mapping[int, str], world_size: int, table: RankTable | None) -> str:
    """Say whom the next epoch waits for: how many workers, or which ranks of the rank table."""
    missing = [rank for rank in range(world_size) if rank not in places]
    if table is None:
        count = f"{len(places)} of {world_size} expert workers are registered"
        return f"{count}; waiting for {len(missing)} more"
    named = [
        f"rank {rank} (device {table.ranks[rank].device} of {table.ranks[rank].server})" for rank in missing
    ]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return (
        f"{len(places)} of the {world_size} ranks of the rank table have an expert worker; waiting for "
        f"{', '.join(named[:MOST_NAMED])}{more}"
    )


def _by_name_at_a_table(candidate: Candidate) -> list[tuple[int, str]]:
    """worker-2 before worker-10 where a rank table seats them; else nothing, which keeps the order."""
    if not candidate.seats:
        return []
    parts = re.split(r"([0-9]+)", candidate.worker_id)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
