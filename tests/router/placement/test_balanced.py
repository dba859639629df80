"""The placement as a whole: complete, apart, and never worse than no thought at all."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.placement import Placement, contiguous
from router.placement.balanced import balanced, check_redundancy, fitting_redundancy, place
from router.placement.coverage import coverage_of
from router.placement.load import ExpertLoads, balancedness, uniform, worker_loads

Case = tuple[ExpertLoads, int, int, int, int]


@st.composite
def fleets(draw: st.DrawFn) -> Case:
    """Loads, workers, redundant experts, groups and nodes."""
    nodes = draw(st.integers(1, 2))
    ep_size = nodes * draw(st.integers(1, 4))
    groups = draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 5))
    fitting = [n for n in range(experts * (ep_size - 1) + 1) if (experts + n) % ep_size == 0]
    redundant = draw(st.sampled_from(fitting))
    assume(ep_size <= experts + redundant)
    token_lists = st.lists(st.integers(0, 100), min_size=experts, max_size=experts)
    layers = {layer: tuple(draw(token_lists)) for layer in draw(st.sets(st.integers(0, 60), max_size=3))}
    return ExpertLoads(layers), ep_size, redundant, groups, nodes


@settings(deadline=None)
@given(fleets())
def test_every_expert_is_placed_and_no_worker_holds_one_twice(case: Case) -> None:
    loads, ep_size, redundant, _, _ = case
    placement = balanced(*case)
    assert placement.layers.keys() == loads.layers.keys()
    for layer_id, shares in placement.layers.items():
        experts = len(loads.layers[layer_id])
        assert len(shares) == ep_size
        assert {len(share) for share in shares} == {(experts + redundant) // ep_size}
        assert set().union(*shares) == set(range(experts))
        assert all(list(share) == sorted(set(share)) for share in shares)


@settings(deadline=None)
@given(fleets())
def test_with_as_many_redundant_experts_as_experts_any_worker_may_be_lost(case: Case) -> None:
    loads, _, redundant, _, _ = case
    placement = balanced(*case)
    for layer_id, tokens in loads.layers.items():
        fewest = min(len(ranks) for ranks in placement.replicas_of(layer_id).values())
        assert fewest >= min(2, (len(tokens) + redundant) // len(tokens))


def dealt(tokens: tuple[int, ...], ep_size: int, redundant: int) -> float:
    """The heaviest worker when slot after slot goes to the next worker, spares to the first experts."""
    slots = sorted(slot % len(tokens) for slot in range(len(tokens) + redundant))
    counts = Counter(slots)
    totals = [0.0] * ep_size
    for index, expert in enumerate(slots):
        totals[index % ep_size] += tokens[expert] / counts[expert]
    return max(totals)


@settings(deadline=None)
@given(fleets())
@example((ExpertLoads({0: (0, 1, 1)}), 2, 1, 1, 1))
@example((ExpertLoads({0: (8, 2, 3, 8, 8, 3)}), 2, 2, 1, 1))
def test_no_worker_is_heavier_than_when_slots_are_dealt_out_in_turn(case: Case) -> None:
    loads, ep_size, redundant, _, _ = case
    one_node = balanced(loads, ep_size, redundant)
    for layer_id, totals in worker_loads(one_node, loads).items():
        assert max(totals) <= dealt(loads.layers[layer_id], ep_size, redundant) + 1e-9


@settings(deadline=None)
@given(fleets())
def test_a_group_of_experts_stays_on_its_node_where_numbers_allow_it(case: Case) -> None:
    loads, ep_size, redundant, groups, nodes = case
    placement = balanced(*case)
    for layer_id, tokens in loads.layers.items():
        if groups % nodes != 0 or len(tokens) + redundant > len(tokens) * (ep_size // nodes):
            continue
        for members in range(0, len(tokens), len(tokens) // groups):
            group = range(members, members + len(tokens) // groups)
            owners = placement.replicas_of(layer_id)
            assert len({rank // (ep_size // nodes) for expert in group for rank in owners[expert]}) == 1


def zipf(num_experts: int, seed: int) -> ExpertLoads:
    """One layer in which the i-th busiest expert has 1/i of the busiest one's tokens."""
    tokens = [10_000_000 // (rank + 1) for rank in range(num_experts)]
    random.Random(seed).shuffle(tokens)
    return ExpertLoads({3: tuple(tokens)})


@pytest.mark.parametrize("seed", range(3))
def test_skewed_loads_of_a_deepseek_v3_layer_are_spread(seed: int) -> None:
    loads = zipf(256, seed)
    assert balancedness(balanced(loads, 32, 32), loads)[3] >= 0.99
    assert balancedness(contiguous(256, 32, [3]), loads)[3] < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_skewed_loads_are_spread_within_every_node_although_replicas_are_kept_apart(seed: int) -> None:
    loads = zipf(256, seed)
    totals = worker_loads(balanced(loads, 32, 32, num_groups=8, num_nodes=4), loads)[3]
    nodes = [totals[first : first + 8] for first in range(0, 32, 8)]
    assert all(max(node) <= 1.05 * sum(node) / len(node) for node in nodes)


def test_a_layer_without_traffic_is_planned_as_if_all_experts_were_equal() -> None:
    silent = balanced(ExpertLoads({1: (0,) * 8}), 4, 4)
    assert silent == balanced(uniform(8, [1]), 4, 4)
    assert Counter(Counter(sum(silent.layers[1], ())).values()) == {1: 4, 2: 4}


def test_without_redundancy_and_traffic_all_workers_hold_as_many_experts() -> None:
    placement = balanced(uniform(64, [1, 2]), 8, 0)
    assert {len(share) for shares in placement.layers.values() for share in shares} == {8}
    assert coverage_of(placement, uniform(64, [1, 2])).experts == 0.0


def test_without_redundancy_and_known_loads_experts_stand_in_blocks() -> None:
    assert place(10, [3, 4], 4) == contiguous(10, 4, [3, 4])
    assert place(8, [3, 4], 4, 4) == balanced(uniform(8, [3, 4]), 4, 4)
    loads = zipf(64, 1)
    assert place(64, [3], 8, 0, loads, 8, 4) == balanced(loads, 8, 0, 8, 4)


def test_the_same_loads_give_the_same_placement() -> None:
    loads = zipf(64, 5)
    assert balanced(loads, 8, 16) == balanced(loads, 8, 16)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((64, 3, 8), r"redundantExperts is 3.*8 workers cannot share 64 \+ 3 experts evenly: choose 0 or 8"),
        ((64, 0, 6), r"cannot share 64 \+ 0 experts evenly: choose 2$"),
        ((4, 5, 2), r"redundantExperts is 5.*choose between 0 and 4"),
        ((4, -1, 3), r"redundantExperts is -1.*choose between 0 and 8"),
        ((4, 0, 5), r"5 expert workers cannot share 4 routed and 0 redundant experts"),
        ((4, 0, 0), r"0 expert workers"),
    ],
)
def test_redundancy_that_does_not_fit_is_refused_with_what_would(
    numbers: tuple[int, int, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_redundancy(*numbers)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 600), st.integers(1, 40))
def test_the_fitting_redundancy_is_accepted_and_wastes_no_slot(
    experts: int, redundant: int, ep_size: int
) -> None:
    assume(ep_size <= experts)
    fitting = fitting_redundancy(experts, redundant, ep_size)
    check_redundancy(experts, fitting, ep_size)
    assert fitting == experts * (ep_size - 1) or 0 <= fitting - redundant < ep_size


def test_a_placement_names_the_workers_of_every_replica() -> None:
    placement = Placement({7: ((0, 2), (1, 2), (0, 1))})
    assert placement.replicas_of(7) == {0: (0, 2), 1: (1, 2), 2: (0, 1)}
