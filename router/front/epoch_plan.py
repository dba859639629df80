"""Which workers form the next epoch. Pure: a snapshot in, a decision out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that is alive. `order` says who registered first."""

    worker_id: str
    order: int


def plan_members(
    candidates: Iterable[Candidate], ranks: Mapping[str, int], world_size: int
) -> tuple[str, ...] | None:
    """Choose the members of the next epoch by ep_rank; None where there are too few.

    A worker that had a rank gets it back; the others fill what is left, first come, first served.

    Args:
        candidates: the workers that are alive.
        ranks: the rank each worker had last; a rank stands there at most once.
        world_size: ranks in the group.
    """
    by_order = sorted(candidates, key=lambda candidate: (candidate.order, candidate.worker_id))
    places: dict[int, str] = {}
    for candidate in by_order:
        rank = ranks.get(candidate.worker_id)
        if rank is not None and rank < world_size:
            places[rank] = candidate.worker_id
    newcomers = [candidate.worker_id for candidate in by_order if candidate.worker_id not in places.values()]
    for rank in range(world_size):
        if rank not in places:
            if not newcomers:
                return None
            places[rank] = newcomers.pop(0)
    return tuple(places[rank] for rank in range(world_size))


def missing_sentence(num_alive: int, world_size: int) -> str:
    """Say how many workers the next epoch waits for."""
    missing = world_size - num_alive
    return f"{num_alive} of {world_size} expert workers are registered; waiting for {missing} more"
