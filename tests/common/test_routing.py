"""Routing by the native kernels and without them, against a loop over slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import native_routing
from common.errors import MessageError
from common.exchange.routing import LayerTable, SortedRows, layer_table, place_slots, route_slots, sort_rows

IS_NATIVE = pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])


@pytest.fixture(autouse=True)
def _chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.getfixturevalue("is_native"):
        monkeypatch.setattr(native_routing, "installed", lambda: None)
    elif native_routing.installed() is None:
        pytest.skip("the native kernels were not built here")


@st.composite
def _choices(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Owners, some without experts, and what tokens choose of them."""
    experts = draw(st.permutations(range(draw(st.integers(1, 24)))))
    cuts = sorted(draw(st.lists(st.integers(0, len(experts)), max_size=4)))
    owners = [experts[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(experts)], strict=True)]
    top_k = draw(st.integers(1, min(6, len(experts))))
    token = st.permutations(range(len(experts))).map(lambda order: list(order[:top_k]))
    return owners, draw(st.lists(token, max_size=40))


@IS_NATIVE
@given(chosen=_choices())
def test_rows_are_sorted_by_worker_and_local_expert_and_then_by_token(
    is_native: bool, chosen: tuple[list[list[int]], list[list[int]]]
) -> None:
    owners, tokens = chosen
    table = layer_table(owners)
    topk_ids = torch.tensor(tokens, dtype=torch.int64).view(len(tokens), -1 if tokens else 3)
    rows = route_slots(topk_ids, table)
    for found in (rows, sort_rows(place_slots(topk_ids, table), table)):
        assert_sorted(found, tokens, owners, table.most_local)


def assert_sorted(
    rows: SortedRows, tokens: list[list[int]], owners: list[list[int]], most_local: int
) -> None:
    place = {expert: (w, at) for w, own in enumerate(owners) for at, expert in enumerate(own)}
    slots = [(place[expert], token) for token, ids in enumerate(tokens) for expert in ids]
    wanted = sorted(range(len(slots)), key=lambda slot: slots[slot])
    assert rows.token_of.tolist() == [slots[slot][1] for slot in wanted]
    assert rows.position_of.flatten().tolist() == [wanted.index(slot) for slot in range(len(slots))]
    for worker, own in enumerate(owners):
        counts = [sum(at == (worker, local) for at, _ in slots) for local in range(len(own))]
        assert rows.counts[worker].tolist() == counts + [0] * (most_local - len(own))
        begin, end = rows.span(worker)
        assert end - begin == sum(counts)


@IS_NATIVE
@pytest.mark.parametrize("expert", [-1, 2, 3, 1 << 40])
def test_an_expert_that_no_worker_holds_is_named_whoever_looks_it_up(is_native: bool, expert: int) -> None:
    table = layer_table(((0,), (1, 3)))
    if expert == 3:
        table = LayerTable(
            table.keys_of[:3], table.first_keys[:3], table.num_replicas[:3], table.num_local, table.most_local
        )
    for look_up in (place_slots, route_slots):
        with pytest.raises(MessageError, match="no worker holds"):
            look_up(torch.tensor([[0, expert]]), table)


@IS_NATIVE
def test_ids_that_are_a_view_are_read_by_their_strides(is_native: bool) -> None:
    table = layer_table(((0, 1), (2, 3)))
    topk_ids = torch.tensor([[3, 0], [1, 2]]).T
    keys = place_slots(topk_ids, table)
    assert keys.tolist() == [[3, 1], [0, 2]]
    for rows in (sort_rows(keys, table), route_slots(topk_ids, table)):
        assert rows.token_of.tolist() == [1, 0, 1, 0]
        assert rows.position_of.tolist() == [[3, 1], [0, 2]]


@IS_NATIVE
def test_row_keys_choose_among_replicas_and_without_them_the_first_serves(is_native: bool) -> None:
    table = layer_table(((0, 1), (2, 1), (1, 0)))
    topk_ids, row_keys = torch.tensor([[0, 1], [1, 2], [1, 0]] * 5), torch.arange(15) * 0x9E3779B97F4A7C1
    held = {0: (0, 5), 1: (1, 3, 4), 2: (2,)}
    for keys_of_rows in (None, row_keys):
        rows = route_slots(topk_ids, table, keys_of_rows)
        keys = place_slots(topk_ids, table, keys_of_rows).flatten().tolist()
        assert all(key in held[expert] for key, expert in zip(keys, topk_ids.flatten().tolist(), strict=True))
        assert (max(keys) > 3) == (keys_of_rows is not None)
        wanted = sorted(range(30), key=lambda slot: (keys[slot], slot))
        assert rows.token_of.tolist() == [slot // 2 for slot in wanted]
        assert rows.position_of.flatten().tolist() == [wanted.index(slot) for slot in range(30)]
        assert rows.counts.flatten().tolist() == [keys.count(key) for key in range(6)]
