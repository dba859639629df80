"""The replica that serves a row: the same everywhere, for numbers and for tensors, and evenly spread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.replica_choice import mix, replica_of, request_key, row_key
from tests.source import ROOT


def test_the_choice_never_changes() -> None:
    key = request_key("chat-1")
    assert key == 1873308655
    assert [replica_of(row_key(key, p, 3), 4) for p in range(12)] == [3, 2, 0, 1, 0, 1, 0, 1, 3, 1, 1, 2]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_another_process_makes_the_same_choices(seed: str) -> None:
    script = (
        "from common.replica_choice import *\n"
        "print([replica_of(row_key(request_key('r\u00e9q'), p, l), 3) for p in range(9) for l in range(9)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    key = request_key("r\u00e9q")
    expected = [replica_of(row_key(key, p, layer), 3) for p in range(9) for layer in range(9)]
    assert result.stdout.strip() == str(expected)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**40)), min_size=1, max_size=20),
    st.integers(0, 100),
    st.integers(1, 9),
)
def test_tensors_and_numbers_give_the_same_choice(
    rows: list[tuple[int, int]], layer_id: int, num_replicas: int
) -> None:
    requests, positions = torch.tensor(rows).unbind(1)
    together = replica_of(row_key(requests, positions, layer_id), torch.tensor(num_replicas))
    alone = [replica_of(row_key(*row, layer_id), num_replicas) for row in rows]
    assert together.tolist() == alone
    assert all(0 <= replica < num_replicas for replica in alone)


def chi_square(choices: list[int], num_replicas: int) -> float:
    expected = len(choices) / num_replicas
    counts = Counter(choices)
    return sum((counts[replica] - expected) ** 2 / expected for replica in range(num_replicas))


@pytest.mark.parametrize("num_replicas", [2, 3, 4, 7])
def test_rows_are_spread_evenly_over_the_replicas(num_replicas: int) -> None:
    key = request_key("one long request")
    by_position = [replica_of(row_key(key, position, 5), num_replicas) for position in range(6000)]
    by_layer = [replica_of(row_key(key, 17, layer_id), num_replicas) for layer_id in range(6000)]
    by_request = [replica_of(row_key(request_key(f"r{i}"), 0, 5), num_replicas) for i in range(6000)]
    # 22.5 is what six degrees of freedom exceed once in a thousand times.
    for choices in (by_position, by_layer, by_request):
        assert chi_square(choices, num_replicas) < 22.5


def test_the_position_changes_the_choice_of_a_layer_independently_of_other_layers() -> None:
    key = request_key("r")
    pairs = [
        2 * replica_of(row_key(key, position, 1), 2) + replica_of(row_key(key, position, 2), 2)
        for position in range(6000)
    ]
    assert chi_square(pairs, 4) < 16.3


def test_mixing_is_one_to_one() -> None:
    values = torch.arange(0, 2**32, 4099)
    mixed = mix(values)
    assert mixed.unique().numel() == values.numel()
    assert int(mixed.min()) >= 0
    assert int(mixed.max()) < 2**32
