"""How long the router waits for an answer before it asks what is the matter."""

from __future__ import annotations

import time
from dataclasses import dataclass

CEILING_S = 120.0
"""Longest wait for one answer, whatever progress is made."""
SLACK = 8.0
EWMA = 0.2


@dataclass(slots=True)
class Deadline:
    """max(floor_s, SLACK x the predicted time of the rows), counted from the last sign of life.

    Attributes:
        seconds_per_row: the prediction, learned from every answer.
        waiting_since_ns: the last answer, or the first question after which none was open.
    """

    floor_s: float
    seconds_per_row: float = 0.0
    waiting_since_ns: int = 0
    at_ns: int = 0

    @property
    def left_s(self) -> float:
        """Time until it passes; not below 0."""
        return max((self.at_ns - time.monotonic_ns()) / 1e9, 0.0)

    @property
    def waited_s(self) -> float:
        """Time since waiting began."""
        return (time.monotonic_ns() - self.waiting_since_ns) / 1e9

    def extend(self, num_rows: int) -> None:
        """Count anew for `num_rows` rows that are not answered yet."""
        budget_s = min(max(self.floor_s, SLACK * self.seconds_per_row * num_rows), CEILING_S)
        self.at_ns = time.monotonic_ns() + int(budget_s * 1e9)

    def learn(self, num_rows: int, posted_ns: int, arrived_ns: int) -> None:
        """Take in an answer for `num_rows` rows; waiting begins again."""
        seconds = max((arrived_ns - max(posted_ns, self.waiting_since_ns)) / 1e9, 0.0)
        weight = EWMA if self.seconds_per_row else 1.0
        self.seconds_per_row += weight * (seconds / max(num_rows, 1) - self.seconds_per_row)
        self.waiting_since_ns = arrived_ns
