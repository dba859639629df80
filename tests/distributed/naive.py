"""What the exchange must give, by a loop over tokens and slots that shares no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from common.exchange import RouterExchange, RowOrigins, StepHeader
from tests.distributed import fleet_of_threads as fleet

E, K, D, LAYER = 9, 3, 16, 1
TOKENS = (0, 1, 2, 17, 64)


def inputs(num_tokens: int, dtype: torch.dtype, hidden_size: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, E, generator=generator)
    scores[:, 0] += 1.0  # expert 0 gets every token
    scores[:, E - 1] -= 2.0  # the last expert gets none
    weights, ids = scores.topk(K, dim=1)
    return hidden, ids, weights


def naive(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, slot in itertools.product(range(hidden.shape[0]), range(ids.shape[1])):
        row = fleet.expert_output(hidden[token : token + 1], int(ids[token, slot]))[0]
        total[token] += (row.float() * weights[token, slot]).double()
    return total.float()


def run_step(
    exchange: RouterExchange,
    step_id: int,
    level: int,
    given: tuple[Tensor, Tensor, Tensor],
    term: int,
    epoch: int = fleet.EPOCH,
    origins: Sequence[RowOrigins] = (),
    round_rows: int = 0,
    chunk_rows: int = 0,
    pass_rows: int = 0,
) -> Tensor:
    header = StepHeader(
        term,
        epoch,
        step_id,
        level,
        given[0].shape[0],
        round_rows=round_rows,
        chunk_rows=chunk_rows,
        pass_rows=pass_rows,
    )
    exchange.begin(header, origins)
    return exchange.combine(exchange.dispatch(LAYER, 0, *given))
