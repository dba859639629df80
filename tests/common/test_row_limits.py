"""The table and the cutoff, by hand and by property: never more than there is, never too little."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.row_limits import DEFAULT_BUFFER_FACTORS, LEAST_ROUND_ROWS, RowLimits


@pytest.mark.parametrize(
    ("num_tokens", "rows"),
    [
        (0, 1),
        (1, 8),  # all there can be are fewer than the least buffer
        (8, 64),
        (64, 512),  # 64 * 8 * 8.0 / 8: a worker may get every row
        (8191, 65528),
        (8192, math.ceil(8192 * 8 * 5.2 / 8)),
        (32767, math.ceil(32767 * 8 * 5.2 / 8)),
        (32768, 32768 * 3),
        (131072, math.ceil(131072 * 1.8)),
        (1048576, math.ceil(1048576 * 1.32)),
    ],
)
def test_the_default_table_gives_these_buffers_to_8_workers_with_8_experts_per_token(
    num_tokens: int, rows: int
) -> None:
    assert RowLimits(num_experts_per_tok=8, moe_ep=8).round_rows(num_tokens) == rows


def test_below_the_last_threshold_the_last_factor_holds() -> None:
    limits = RowLimits(num_experts_per_tok=6, moe_ep=2, buffer_factors=((1000, 1.0), (100, 0.5)))
    assert limits.round_rows(1000) == 3000
    assert limits.round_rows(999) == math.ceil(999 * 6 * 0.5 / 2)
    assert limits.round_rows(50) == math.ceil(50 * 6 * 0.5 / 2)
    assert limits.round_rows(20) == LEAST_ROUND_ROWS


def test_the_cutoff_of_the_documented_example_keeps_a_quarter_of_the_rows() -> None:
    limits = RowLimits(num_experts_per_tok=8, moe_ep=8, cutoff_factor=0.25)
    assert limits.pass_rows(65000) == 130000
    assert limits.pass_rows(2048) == 4096
    assert limits.pass_rows(100) == 800
    assert RowLimits(num_experts_per_tok=8, moe_ep=8).pass_rows(65000) == 520000


tables = st.lists(
    st.tuples(st.integers(0, 1 << 21), st.floats(1e-3, 100.0)), min_size=1, unique_by=lambda pair: pair[0]
).map(lambda pairs: tuple(sorted(pairs, reverse=True)))


@given(
    st.integers(0, 1 << 20),
    st.integers(1, 64),
    st.integers(1, 512),
    st.one_of(st.just(DEFAULT_BUFFER_FACTORS), tables),
    st.one_of(st.none(), st.floats(1e-6, 1.0)),
    st.integers(1, 1 << 16),
)
def test_limits_stay_between_what_is_promised_and_what_there_is(
    num_tokens: int,
    top_k: int,
    moe_ep: int,
    table: tuple[tuple[int, float], ...],
    factor: float | None,
    min_rows: int,
) -> None:
    limits = RowLimits(top_k, moe_ep, table, factor, min_rows)
    rows = num_tokens * top_k
    assert max(min(rows, LEAST_ROUND_ROWS), 1) <= limits.round_rows(num_tokens) <= max(rows, 1)
    assert min(rows, top_k) <= limits.pass_rows(num_tokens) <= max(rows, top_k)
    assert limits.pass_rows(num_tokens) >= min(rows, min_rows)
