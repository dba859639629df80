"""EPLB against what deepseek-ai/EPLB (commit d52c72d) computed, and by its properties."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from router.placement.eplb import Slots, pack, rebalance, replicate

GOLDEN = json.loads((Path(__file__).parent / "eplb_golden.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_the_reference_fills_the_slots_alike(case: dict[str, Any]) -> None:
    numbers = [case[key] for key in ("num_replicas", "num_groups", "num_nodes", "num_gpus")]
    layers = [rebalance(weight, *numbers) for weight in case["weight"]]
    most = max(len(slots) for layer in layers for slots in layer.of_experts())
    padded = [[[*slots, *[-1] * (most - len(slots))] for slots in layer.of_experts()] for layer in layers]
    assert [list(layer.experts) for layer in layers] == case["phy2log"]
    assert padded == case["log2phy"]
    assert [[len(slots) for slots in layer.of_experts()] for layer in layers] == case["logcnt"]


def device_loads(slots: Slots, loads: list[int], num_devices: int) -> list[float]:
    size = len(slots.experts) // num_devices
    return [
        sum(
            loads[expert] / slots.experts.count(expert)
            for expert in slots.experts[device * size : (device + 1) * size]
        )
        for device in range(num_devices)
    ]


def test_the_golden_example_is_balanced_as_measured() -> None:
    case = GOLDEN[0]
    found = []
    for loads in case["weight"]:
        heavy = device_loads(rebalance(loads, 16, 4, 2, 8), loads, 8)
        found.append(round(sum(heavy) / 8 / max(heavy), 4))
    assert found == [0.8277, 0.8050]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], int, int, int, int]:
    """Loads, slots, groups, nodes and devices that fit together."""
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 3))
    least = -(-experts // devices)
    slots = devices * draw(st.integers(least, least + 3))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return loads, slots, groups, nodes, devices


@settings(deadline=None)
@given(layers())
def test_every_slot_is_filled_and_every_expert_is_somewhere(
    case: tuple[list[int], int, int, int, int],
) -> None:
    loads, num_slots, _, _, _ = case
    slots = rebalance(*case)
    assert len(slots.experts) == num_slots
    assert set(slots.experts) == set(range(len(loads)))
    for expert, own in enumerate(slots.of_experts()):
        assert [slots.experts[slot] for slot in own] == [expert] * len(own)
        assert [slots.replicas[slot] for slot in own] == list(range(len(own)))


@settings(deadline=None)
@given(layers())
def test_a_group_stays_on_one_node(case: tuple[list[int], int, int, int, int]) -> None:
    loads, num_slots, num_groups, num_nodes, _ = case
    slots = rebalance(*case)
    nodes_of: dict[int, set[int]] = {}
    for slot, expert in enumerate(slots.experts):
        group = expert // (len(loads) // num_groups)
        nodes_of.setdefault(group, set()).add(slot // (num_slots // num_nodes))
    assert {len(nodes) for nodes in nodes_of.values()} == {1}


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 5))
def test_spare_slots_leave_the_busiest_replica_as_light_as_any_choice(loads: list[int], spare: int) -> None:
    counts = [0] * len(loads)
    for expert in replicate(loads, len(loads) + spare, 1, 99).experts:
        counts[expert] += 1
    choices = combinations_with_replacement(range(len(loads)), spare)
    best = min(
        max(load / (1 + choice.count(expert)) for expert, load in enumerate(loads)) for choice in choices
    )
    assert max(load / count for load, count in zip(loads, counts, strict=True)) == pytest.approx(best)


def test_no_expert_gets_more_replicas_than_allowed_however_busy_it_is() -> None:
    slots = replicate([1000, 1, 1, 1], 8, 1, 3)
    assert sorted(map(len, slots.of_experts())) == [1, 2, 2, 3]
    assert len(slots.of_experts()[0]) == 3


def test_a_least_number_of_replicas_comes_before_load() -> None:
    assert [len(own) for own in replicate([1000, 1, 1, 0], 9, 2, 4).of_experts()] == [3, 2, 2, 2]


def test_heavy_items_go_to_the_lightest_pack_that_has_room() -> None:
    assert pack([1, 9, 8, 1, 1, 1], 2) == [(1, 1), (0, 0), (1, 0), (0, 1), (1, 2), (0, 2)]


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((8, 1, 1, 3), "slots"),
        ((8, 3, 3, 8), "devices"),
        ((3, 1, 1, 3), "few"),
        ((8, 2, 2, 4), "groups"),
        ((4, 1, 1, 4), "between"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int, int], word: str) -> None:
    loads = [1] * (3 if word == "groups" else 4)
    with pytest.raises(ConfigError) as caught:
        rebalance(loads, *numbers, bounds=(2, 3) if word == "between" else None)
    assert word in str(caught.value)
