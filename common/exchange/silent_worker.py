"""Which expert worker holds a group up: a collective does not say, so their agents are asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROBE_S = 0.05
"""Pause between two questions."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the answers say.

    Attributes:
        ep_rank: whom to name; None while some worker moves, so that there is reason to wait on.
        cause: a sentence part that says how sure that is.
    """

    ep_rank: int | None
    cause: str


def judge(before: Sequence[int | None], after: Sequence[int | None]) -> Verdict:
    """Compare two answers of each worker, in ep_rank order; None is a worker out of reach.

    Only a worker out of reach is certain. One that stands still may just wait for another, so that nobody is
    named while anybody moves.
    """
    for ep_rank, answers in enumerate(zip(before, after, strict=True)):
        if None in answers:
            return Verdict(ep_rank, "it is out of reach or stopped")
    is_alone, doubt = len(before) == 1, f"this is merely the first of {len(before)}"
    if any(old != new for old, new in zip(before, after, strict=True)):
        return Verdict(None, "it moves" if is_alone else f"no worker is out of reach, {doubt}")
    return Verdict(0, "it makes no progress" if is_alone else f"no worker makes progress, {doubt}")


def inquire(ask_progress: Callable[[int], int | None], ep_size: int, attempts: int = 1) -> Verdict:
    """Ask every worker twice or, while none is out of reach, up to `attempts` times more."""
    before = ask_all(ask_progress, ep_size)
    verdict = judge(before, before)
    for _ in range(attempts):
        if None in before:
            break
        time.sleep(PROBE_S)
        after = ask_all(ask_progress, ep_size)
        verdict = judge(before, after)
        before = after
    return verdict


def ask_all(ask_progress: Callable[[int], int | None], ep_size: int) -> list[int | None]:
    """One answer of each worker; after one out of reach the others count as unmoved and are not asked."""
    answers: list[int | None] = []
    for ep_rank in range(ep_size):
        answers.append(ask_progress(ep_rank))
        if answers[-1] is None:
            break
    return answers + [0] * (ep_size - len(answers))
