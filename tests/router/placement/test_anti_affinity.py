"""Replicas kept apart, whatever the start."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from router.placement.anti_affinity import separate


@st.composite
def any_shares(draw: st.DrawFn) -> list[list[int]]:
    """Shares of one size in any order, no expert more often than there are workers."""
    workers, size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    counts: list[int] = []
    while sum(counts) < workers * size:
        counts.append(draw(st.integers(1, min(workers, workers * size - sum(counts)))))
    row = draw(st.permutations([expert for expert, count in enumerate(counts) for _ in range(count)]))
    return [row[worker * size : (worker + 1) * size] for worker in range(workers)]


@settings(deadline=None)
@given(any_shares(), st.lists(st.floats(0, 100), min_size=36, max_size=36))
def test_no_worker_holds_an_expert_twice_and_nothing_is_lost(
    shares: list[list[int]], loads: list[float]
) -> None:
    apart = separate(shares, dict(enumerate(loads)))
    assert all(len(set(share)) == len(share) for share in apart)
    assert [len(share) for share in apart] == [len(share) for share in shares]
    assert Counter(chain(*apart)) == Counter(chain(*shares))


def test_shares_without_doubles_stay_as_they_are() -> None:
    assert separate([[3, 1], [1, 2]], {1: 5.0, 2: 1.0, 3: 9.0}) == [[3, 1], [1, 2]]


def test_of_the_repairs_that_are_possible_the_best_balanced_is_taken() -> None:
    loads = {0: 4.0, 1: 3.0, 2: 9.0, 3: 5.0, 4: 1.0}
    # With worker 1 one of the two would carry 13, with worker 2 only 9; 5 for 4 moves less than 1 for 4.
    assert separate([[0, 0], [1, 2], [3, 4]], loads) == [[0, 3], [1, 2], [4, 0]]


def test_a_repair_may_need_more_than_the_first_double() -> None:
    # From worker 0 no exchange ends the double of 4: worker 1, the only one without it, has what 0 has.
    shares = [[4, 4, 5, 6], [5, 5, 6, 6], [4, 7, 8, 9]]
    apart = separate(shares, dict.fromkeys(range(10), 1.0))
    assert all(len(set(share)) == 4 for share in apart)


def test_more_replicas_than_workers_are_refused_with_the_expert() -> None:
    with pytest.raises(ConfigError, match=r"expert 7 has 3 replicas for 2 workers.*fewer redundant experts"):
        separate([[7, 7], [7, 1]], {1: 1.0, 7: 1.0})


def test_shares_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="between 1 and 2 experts"):
        separate([[1, 2], [3]], dict.fromkeys(range(4), 1.0))
