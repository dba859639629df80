"""The only place where logits become token ids.

Order: temperature, top_k, top_p over what top_k left; then the distribution is inverted at a uniform number.
Shapes: B sequences, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import compute_threads, native_argmax
from router.sequence import Sampling, Sequence

FIRST_LOOK = 128
"""Likeliest tokens that are sorted at first: most draws end there, and a vocabulary takes long to sort."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A token and what was asked about it.

    Attributes:
        logprob: of the raw logits, whatever temperature, top_k and top_p are; None where not asked for.
        top: the likeliest alternatives, best first, as (token id, logprob).
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: Row[Sequence]) -> list[Draw | None]:
    """Draw the next token of each sequence. A row's result depends on that row alone, whatever the batch.

    A row that holds NaN, or no finite maximum, gives None: the model has no answer there.

    Args:
        logits: [B, V] float32 or bfloat16, with the same result: widening is exact.
        sequences: the B sequences the rows belong to.
    """
    if not sequences:
        return []
    on_cpu = logits.to("cpu")
    native = native_argmax.installed()
    likeliest_ids, is_answerable = (_find_likeliest if native is None else native.find)(on_cpu)
    return [
        _draw(on_cpu, index, sequence, likeliest_ids[index]) if is_answerable[index] else None
        for index, sequence in enumerate(sequences)
    ]


def _find_likeliest(logits: Tensor) -> tuple[list[int], list[bool]]:  # [B, V] -> 2 x [B]
    """The first of equals, or a NaN where there is one, and whether it is finite: as the kernel does."""
    with compute_threads.whole_team():
        widened = logits.float()  # torch takes longer to compare bfloat16
        found = widened.argmax(dim=-1, keepdim=True)
    return found.squeeze(-1).tolist(), widened.gather(-1, found).isfinite().squeeze(-1).tolist()


def uniform(seed: int, position: int) -> float:
    """The noise of one token, in [0, 1): a pure function of its sequence's seed and its position."""
    bits = int(np.random.Philox(key=seed % (1 << 64), counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def _draw(logits: Tensor, index: int, sequence: Sequence, likeliest_id: int) -> Draw:  # [B, V]
    sampling = sequence.sampling
    if sampling.is_greedy and sampling.logprobs is None:
        return Draw(likeliest_id)  # to widen a row takes longer than to find it
    row = logits[index].float().numpy()
    token_id = likeliest_id
    if not sampling.is_greedy:
        token_id = draw(row, sampling, uniform(sampling.seed, len(sequence.tokens)))
    if sampling.logprobs is None:
        return Draw(token_id)
    shifted = row.astype(np.float64) - float(row.max())
    log_total = float(np.log(np.exp(shifted).sum()))
    top_ids = likeliest(row, sampling.logprobs).tolist()
    return Draw(
        token_id,
        float(shifted[token_id]) - log_total,
        tuple((top_id, float(shifted[top_id]) - log_total) for top_id in top_ids),
    )


def draw(row: NDArray[np.float32], sampling: Sampling, noise: float) -> int:
    """Draw one token by inverting the distribution over tokens sorted by (-logit, id).

    top_k keeps exactly k tokens, equal logits by id. top_p keeps the fewest of them, likeliest first and at
    least one, whose share of the mass that top_k left is top_p.

    Args:
        row: [V] with a finite maximum.
        noise: in [0, 1).
    """
    # With a tiny temperature everything but the maximum becomes -inf, as it should.
    with np.errstate(over="ignore"):
        weights = np.exp((row.astype(np.float64) - float(row.max())) / sampling.temperature)
    limit = min(sampling.top_k, len(row)) if sampling.top_k > 0 else len(row)
    num_sorted = limit if sampling.top_k > 0 else min(FIRST_LOOK, limit)
    total = None if sampling.top_k > 0 else float(weights.sum())
    while True:
        ids = likeliest(row, num_sorted)
        index = _invert(np.cumsum(weights[ids]), total, sampling.top_p, noise, is_all=num_sorted == limit)
        if index is not None:
            return int(ids[index])
        # The prefix sums of a longer sort begin with the same numbers, so looking further changes no draw.
        num_sorted = min(num_sorted * 16, limit)


def _invert(
    cumulative: NDArray[np.float64], total: float | None, top_p: float, noise: float, is_all: bool
) -> int | None:
    """Index of the drawn token; None where it lies beyond these and they are not all."""
    kept = float(cumulative[-1]) if total is None else total
    last = len(cumulative) - 1
    if top_p < 1.0:
        nucleus = int(np.searchsorted(cumulative, top_p * kept, side="left"))
        if nucleus > last and not is_all:
            return None
        last = min(nucleus, last)
        kept = float(cumulative[last])
    index = int(np.searchsorted(cumulative[: last + 1], noise * kept, side="right"))
    if index <= last:
        return index
    if top_p >= 1.0 and not is_all:
        return None
    # Rounding put the noise past the end: the last token with any weight.
    return int(np.searchsorted(cumulative[: last + 1], cumulative[last], side="left"))


def likeliest(row: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The ids of the `count` greatest logits, sorted by (-logit, id)."""
    if count <= 0:
        return np.empty(0, dtype=np.intp)
    if count >= len(row):
        return np.argsort(-row, kind="stable")
    least = torch.topk(torch.from_numpy(row), count, sorted=False).values.min().item()
    candidates = np.flatnonzero(row >= least)
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]
