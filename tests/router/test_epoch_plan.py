"""Who gets which rank in the next epoch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.placement import Placement
from common.rank_table import parse_rank_table
from router.front.epoch_plan import Candidate, missing_sentence, place_workers, seat_all, seat_survivors
from tests.common.test_rank_table import table

NAMES = ("w-2", "w-10", "w-1", "other")


def members(candidates: list[Candidate], ranks: dict[str, int], world_size: int) -> tuple[str, ...] | None:
    """By rank; None where one stays empty."""
    places = place_workers(candidates, ranks, world_size)
    return tuple(places[rank] for rank in range(world_size)) if len(places) == world_size else None


def test_members_get_their_ranks_back_and_newcomers_fill_what_is_left() -> None:
    candidates = [Candidate("a", 1), Candidate("b", 2), Candidate("c", 3)]
    assert members(candidates, {}, 2) == ("a", "b")
    assert members(candidates, {"c": 0}, 2) == ("c", "a")
    assert members(candidates[1:], {"a": 0, "b": 1}, 2) == ("c", "b")
    assert members(candidates[:1], {"b": 0}, 2) is None


@given(st.permutations(NAMES))
def test_a_table_seats_the_workers_of_a_server_by_name_whoever_came_first(order: list[str]) -> None:
    candidates = [Candidate(name, order.index(name), (3, 0, 2, 1)) for name in NAMES]
    assert members(candidates, {}, 4) == ("w-1", "w-10", "w-2", "other")


def test_a_table_gives_nobody_the_rank_of_another_server() -> None:
    here, there = Candidate("a", 1, (0, 1)), Candidate("b", 2, (2,))
    assert members([here, there], {}, 3) is None
    assert members([here, there, Candidate("c", 3, (2,))], {}, 3) is None
    assert members([here, there, Candidate("c", 3, (0, 1))], {}, 3) == ("a", "c", "b")
    # What was remembered from before is worth nothing where the table says otherwise.
    assert members([here, there, Candidate("c", 3, (0, 1))], {"b": 0}, 3) == ("a", "c", "b")


def test_a_known_device_comes_before_a_remembered_rank_and_that_before_a_name() -> None:
    known, remembered, named = (
        Candidate("z", 3, (1,)),
        Candidate("y", 2, (0, 1, 2)),
        Candidate("a", 1, (0, 1, 2)),
    )
    assert members([known, remembered, named], {"y": 2}, 3) == ("a", "z", "y")
    assert members([known, remembered, named], {"y": 1}, 3) == ("a", "z", "y")
    assert members([known, remembered, named], {"a": 2}, 3) == ("y", "z", "a")


def test_what_is_waited_for_is_counted_or_named() -> None:
    assert missing_sentence({0: "a"}, 3, None) == "1 of 3 expert workers are registered; waiting for 2 more"
    places = {0: "a", 2: "b"}
    assert missing_sentence(places, 4, parse_rank_table(table())) == (
        "2 of the 4 ranks of the rank table have an expert worker; waiting for "
        "rank 1 (device 1 of 10.0.0.0), rank 3 (device 1 of 10.0.0.1)"
    )
    many = parse_rank_table(table(4, 2))
    assert missing_sentence({}, 8, many).endswith("rank 3 (device 1 of 10.0.0.1) and 4 more")


def test_survivors_keep_what_they_hold_and_are_numbered_anew() -> None:
    placement = Placement({1: ((0, 1), (1, 2), (2, 0)), 2: ((2, 0), (0, 1), (1, 2))})
    held = {"a": 0, "b": 1, "c": 2}
    survivors = seat_survivors({0: "a", 2: "c"}, held, placement)
    assert survivors is not None
    assert (survivors.members, survivors.ranks) == (("a", "c"), (0, 2))
    assert survivors.placement == Placement({1: ((0, 1), (2, 0)), 2: ((2, 0), (1, 2))})
    # A spare that has not loaded is no survivor, and one that is left does not hold everything.
    assert seat_survivors({0: "a", 1: "spare", 2: "c"}, held, placement) == survivors
    assert seat_survivors({0: "a", 1: "spare"}, held, placement) is None
    assert seat_survivors({}, held, placement) is None
    assert seat_survivors({0: "b", 1: "a", 2: "c"}, held, placement) is None  # others' places
    whole = seat_all({0: "a", 1: "b", 2: "c"}, placement)
    assert whole == seat_survivors({0: "a", 1: "b", 2: "c"}, held, placement)
    assert seat_all({0: "a", 2: "c"}, placement) is None
