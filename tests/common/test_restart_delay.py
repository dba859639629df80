"""What dies once is started again at once; what keeps dying waits longer and longer."""

from __future__ import annotations

from common.restart_delay import RestartDelay


def test_the_first_death_costs_no_time_and_the_next_ones_more_and_more() -> None:
    delay = RestartDelay()
    assert [delay.after(1.0) for _ in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_what_has_lived_for_a_while_is_started_again_at_once() -> None:
    delay = RestartDelay()
    for _ in range(5):
        delay.after(1.0)
    assert [delay.after(60.0), delay.after(1.0), delay.after(60.0)] == [0, 0.5, 0]
