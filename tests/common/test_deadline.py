"""How long the router waits: 8 times the prediction, between the floor and the ceiling."""

from __future__ import annotations

import time

import pytest

from common.exchange.deadline import CEILING_S, Deadline


@pytest.mark.parametrize(
    ("seconds_per_row", "num_rows", "wanted_s"),
    [(0.0, 1000, 0.25), (0.001, 10, 0.25), (0.001, 100, 0.8), (0.01, 10_000, CEILING_S)],
)
def test_the_deadline_follows_the_prediction_between_floor_and_ceiling(
    seconds_per_row: float, num_rows: int, wanted_s: float
) -> None:
    deadline = Deadline(0.25, seconds_per_row)
    now_ns = time.monotonic_ns()
    deadline.extend(num_rows)
    assert (deadline.at_ns - now_ns) / 1e9 == pytest.approx(wanted_s, abs=0.1)


def test_an_answer_is_timed_from_when_waiting_for_it_began() -> None:
    deadline = Deadline(0.25)
    deadline.waiting_since_ns = 5_000_000_000
    deadline.learn(10, posted_ns=1_000_000_000, arrived_ns=6_000_000_000)
    assert deadline.seconds_per_row == pytest.approx(0.1)
    deadline.learn(0, posted_ns=6_000_000_000, arrived_ns=6_600_000_000)
    assert deadline.seconds_per_row == pytest.approx(0.1 + 0.2 * 0.5)
    assert deadline.waiting_since_ns == 6_600_000_000
