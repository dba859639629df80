"""Rounds carry every row once, in order, and never more than fits."""

from __future__ import annotations

import itertools

import pytest
import torch

from common.exchange.rounds import cut_rounds
from common.exchange.routing import layer_table, place_slots, sort_rows

OWNERS = ((4, 0, 2), (), (1, 3))


@pytest.mark.parametrize("round_rows", [1, 2, 5, 7, 100])
def test_rounds_carry_every_row_once_and_count_it_for_its_expert(round_rows: int) -> None:
    scores = torch.rand(23, 5, generator=torch.Generator().manual_seed(1))
    topk_ids = scores.topk(2).indices
    table = layer_table(OWNERS)
    sorted_rows = sort_rows(place_slots(topk_ids, table), table)
    carried: list[list[int]] = [[] for _ in OWNERS]
    for one in cut_rounds(sorted_rows, round_rows):
        assert any(end > begin for begin, end in one.parts)
        for worker, (begin, end) in enumerate(one.parts):
            assert 0 <= end - begin <= round_rows
            carried[worker] += range(begin, end)
            experts = topk_ids.flatten()[sorted_rows.position_of.flatten().argsort()][begin:end].tolist()
            wanted = [experts.count(expert) for expert in OWNERS[worker]]
            assert one.counts[worker].tolist() == wanted + [0] * (3 - len(wanted))
    assert list(itertools.chain(*carried)) == list(range(46))
    assert [len(rows) for rows in carried] == sorted_rows.counts.sum(1).tolist()
