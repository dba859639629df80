"""Counts per layer and expert as lines of blocks: the darker, the more. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SHADES = " ░▒▓█"


def shades(counts: Sequence[int], width: int) -> str:
    """One line of at most `width` cells; where there are more experts, a cell is several of them.

    The darkest shade is twice the average of the layer or more, so that layers can be compared.
    """
    if not counts or not sum(counts):
        return SHADES[0] * min(len(counts), width)
    cells = min(len(counts), width)
    bounds = [len(counts) * cell // cells for cell in range(cells + 1)]
    average = sum(counts) / len(counts)
    return "".join(
        _shade(sum(counts[begin:end]) / (end - begin) / average) for begin, end in pairwise(bounds)
    )


def imbalance(counts: Sequence[int]) -> float:
    """The largest count over the average; 0 without any."""
    return max(counts) * len(counts) / sum(counts) if counts and sum(counts) else 0.0


def _shade(share: float) -> str:
    if share <= 0:
        return SHADES[0]
    return SHADES[1 + min(int(share * 2), len(SHADES) - 2)]
