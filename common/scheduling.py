"""Who gets a processor that two threads want. Torch-free."""

from __future__ import annotations

import contextlib
import os


def give_way_when_woken() -> None:
    """Let this thread, and those it starts, wait for a free processor when something wakes them.

    A thread that is woken may otherwise take the processor of the one that woke it, which has more to say.
    Does nothing where the system does not know SCHED_BATCH, or does not allow it.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
