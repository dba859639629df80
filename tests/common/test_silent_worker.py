"""Who is named when a group does not answer."""

from __future__ import annotations

import itertools

import pytest

from common.exchange.silent_worker import inquire, judge


@pytest.mark.parametrize(
    ("before", "after", "named", "cause"),
    [
        ([4, 9, 5], [4, None, 5], 1, "out of reach"),
        ([4, None, 0], [6, 3, 8], 1, "out of reach"),
        ([4, 9, 5], [4, 9, 6], None, "no worker is out of reach, this is merely the first of 3"),
        ([4, 9], [4, 9], 0, "no worker makes progress, this is merely the first of 2"),
        ([4], [4], 0, "it makes no progress"),
        ([4], [5], None, "it moves"),
    ],
)
def test_only_a_worker_out_of_reach_is_certain_and_nobody_is_named_while_anybody_moves(
    before: list[int | None], after: list[int | None], named: int | None, cause: str
) -> None:
    verdict = judge(before, after)
    assert verdict.ep_rank == named
    assert cause in verdict.cause


def test_a_death_that_the_agent_notices_late_is_found_and_nobody_is_asked_after_it() -> None:
    asked: list[int] = []

    def ask(ep_rank: int) -> int | None:
        asked.append(ep_rank)
        return None if ep_rank == 1 and len(asked) > 6 else 7

    assert inquire(ask, 3, attempts=4).ep_rank == 1
    assert asked == [0, 1, 2, 0, 1, 2, 0, 1]


def test_movement_between_any_two_answers_counts() -> None:
    ticks = itertools.chain([1, 1, 2], itertools.repeat(2))
    assert inquire(lambda ep_rank: next(ticks), 1, attempts=2).ep_rank is None
