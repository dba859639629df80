"""Who gets which rank in the next epoch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.front.epoch_plan import Candidate, plan_members

NAMES = ("w-2", "w-10", "w-1", "other")


def test_members_get_their_ranks_back_and_newcomers_fill_what_is_left() -> None:
    candidates = [Candidate("a", 1), Candidate("b", 2), Candidate("c", 3)]
    assert plan_members(candidates, {}, 2) == ("a", "b")
    assert plan_members(candidates, {"c": 0}, 2) == ("c", "a")
    assert plan_members(candidates[1:], {"a": 0, "b": 1}, 2) == ("c", "b")
    assert plan_members(candidates[:1], {"b": 0}, 2) is None


@given(st.permutations(NAMES))
def test_a_table_seats_the_workers_of_a_server_by_name_whoever_came_first(order: list[str]) -> None:
    candidates = [Candidate(name, order.index(name), (3, 0, 2, 1)) for name in NAMES]
    assert plan_members(candidates, {}, 4) == ("w-1", "w-10", "w-2", "other")


def test_a_table_gives_nobody_the_rank_of_another_server() -> None:
    here, there = Candidate("a", 1, (0, 1)), Candidate("b", 2, (2,))
    assert plan_members([here, there], {}, 3) is None
    assert plan_members([here, there, Candidate("c", 3, (2,))], {}, 3) is None
    assert plan_members([here, there, Candidate("c", 3, (0, 1))], {}, 3) == ("a", "c", "b")
    # What was remembered from before is worth nothing where the table says otherwise.
    assert plan_members([here, there, Candidate("c", 3, (0, 1))], {"b": 0}, 3) == ("a", "c", "b")


def test_a_known_device_comes_before_a_remembered_rank_and_that_before_a_name() -> None:
    known, remembered, named = (
        Candidate("z", 3, (1,)),
        Candidate("y", 2, (0, 1, 2)),
        Candidate("a", 1, (0, 1, 2)),
    )
    assert plan_members([known, remembered, named], {"y": 2}, 3) == ("a", "z", "y")
    assert plan_members([known, remembered, named], {"y": 1}, 3) == ("a", "z", "y")
    assert plan_members([known, remembered, named], {"a": 2}, 3) == ("y", "z", "a")
