"""Rounds of an all-to-all: rows that do not fit one worker's buffer take another. Pure.

Shapes: R rows, W workers, M most experts of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.exchange.routing import SortedRows


@dataclass(frozen=True, slots=True)
class Round:
    """What one all-to-all carries.

    Attributes:
        parts: for each worker, first row and one past the last of the sorted rows.
        counts: [W, M] rows per expert.
    """

    parts: tuple[tuple[int, int], ...]
    counts: Tensor


def cut_rounds(sorted_rows: SortedRows, round_rows: int) -> list[Round]:
    """Cut the rows so that no worker gets more than `round_rows` at once; no round without a row."""
    ep_size = sorted_rows.counts.shape[0]
    spans = [sorted_rows.span(ep_rank) for ep_rank in range(ep_size)]
    running = sorted_rows.counts.cumsum(1)
    rounds = []
    for low in range(0, max(end - begin for begin, end in spans), round_rows):
        high = low + round_rows
        parts = tuple((min(begin + low, end), min(begin + high, end)) for begin, end in spans)
        counts = running.clamp(low, high).diff(dim=1, prepend=torch.full((ep_size, 1), low))
        rounds.append(Round(parts, counts))
    return rounds
