"""No two replicas of an expert on one worker: else the loss of that worker takes both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from common.errors import ConfigError

WORTHWHILE = 1 - 1e-3
"""How much lighter the heaviest worker has to become for an exchange that ends no double."""


class Swap(NamedTuple):
    """Two workers exchange an expert each. In order, the best comes first.

    Attributes:
        heavier: load of the heavier of the two afterwards.
        change: how far their loads move.
    """

    heavier: float
    change: float
    worker: int
    expert: int
    other: int
    taken: int


def separate(shares: Sequence[Sequence[int]], loads: Mapping[int, float]) -> list[list[int]]:
    """Exchange experts between workers until none holds an expert twice, with the least harm to balance.

    If the heaviest worker is heavier then, further exchanges take back what they can of that.

    While there is a double, some exchange ends one and makes none. Suppose not: worker A holds e twice, so
    that some worker B has no e, as no expert is held more often than there are workers. A holds all that B
    holds, or they could exchange. So B, as large as A, has fewer different experts than A, and one of them
    twice. The same is then true of B and some worker C: a chain that never ends.

    Args:
        shares: for each worker the experts it holds; all hold equally many.
        loads: for each expert the load of one of its replicas.

    Raises:
        ConfigError: an expert is held more often than there are workers, or shares differ in size.
    """
    held = [list(share) for share in shares]
    _check(held)
    totals = [sum(loads[expert] for expert in share) for share in held]
    heaviest = max(totals, default=0.0)
    while swap := min(_separating(held, totals, loads), default=None):
        _exchange(swap, held, totals, loads)
    while max(totals, default=0.0) * WORTHWHILE > heaviest:
        swap = min(_lightening(held, totals, loads), default=None)
        if swap is None:
            break
        _exchange(swap, held, totals, loads)
    return held


def _check(held: list[list[int]]) -> None:
    if len({len(share) for share in held}) > 1:
        sizes = sorted({len(share) for share in held})
        raise ConfigError(
            f"workers hold between {sizes[0]} and {sizes[-1]} experts, but replicas are kept apart only "
            "where all hold equally many: choose redundant experts that the workers can share evenly"
        )
    for expert, count in sorted(Counter(expert for share in held for expert in share).items()):
        if count > len(held):
            raise ConfigError(
                f"expert {expert} has {count} replicas for {len(held)} workers, so that two would share one: "
                "choose fewer redundant experts or more workers"
            )


def _separating(held: list[list[int]], totals: list[float], loads: Mapping[int, float]) -> Iterator[Swap]:
    """Every exchange that ends a double and makes none."""
    for worker, share in enumerate(held):
        for expert in (expert for expert, count in Counter(share).items() if count > 1):
            yield from _swaps_of(worker, expert, held, totals, loads)


def _lightening(held: list[list[int]], totals: list[float], loads: Mapping[int, float]) -> Iterator[Swap]:
    """Every exchange that takes load from the heaviest worker, makes nobody as heavy, and makes no double."""
    worker = max(range(len(held)), key=totals.__getitem__)
    for expert in held[worker]:
        for swap in _swaps_of(worker, expert, held, totals, loads):
            if swap.heavier < totals[worker] * WORTHWHILE:
                yield swap


def _swaps_of(
    worker: int, expert: int, held: list[list[int]], totals: list[float], loads: Mapping[int, float]
) -> Iterator[Swap]:
    for other, others in enumerate(held):
        if expert in others:
            continue
        for taken in set(others).difference(held[worker]):
            difference = loads[expert] - loads[taken]
            heavier = max(totals[worker] - difference, totals[other] + difference)
            yield Swap(heavier, abs(difference), worker, expert, other, taken)


def _exchange(swap: Swap, held: list[list[int]], totals: list[float], loads: Mapping[int, float]) -> None:
    held[swap.worker].remove(swap.expert)
    held[swap.worker].append(swap.taken)
    held[swap.other].remove(swap.taken)
    held[swap.other].append(swap.expert)
    difference = loads[swap.expert] - loads[swap.taken]
    totals[swap.worker] -= difference
    totals[swap.other] += difference
