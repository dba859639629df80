"""How long to wait before what died is started again."""

from __future__ import annotations

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
STEADY_S = 10.0
"""What lived this long did not die of its own start."""


class RestartDelay:
    """Not at all, unless it dies again soon: then longer every time. One for each thing that is kept."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        """Seconds to wait now that it has died, having lived for some time."""
        delay_s = 0.0 if lived_s > STEADY_S else self._next_s
        self._next_s = min(2 * delay_s, LONGEST_DELAY_S) if delay_s else FIRST_DELAY_S
        return delay_s
