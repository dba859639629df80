"""Coverage against a count of what is left when each worker in turn is taken away."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.placement import Placement
from router.placement.coverage import coverage_of
from router.placement.load import ExpertLoads


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, ExpertLoads]:
    ep_size, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    layers, tokens = {}, {}
    for layer_id in draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)):
        owners = [
            draw(st.sets(st.integers(0, ep_size - 1), min_size=1, max_size=ep_size)) for _ in range(experts)
        ]
        layers[layer_id] = tuple(
            tuple(expert for expert in range(experts) if rank in owners[expert]) for rank in range(ep_size)
        )
        tokens[layer_id] = tuple(draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts)))
    return Placement(layers), ExpertLoads(tokens)


@settings(deadline=None)
@given(placements())
def test_coverage_is_what_is_left_when_a_worker_is_taken_away(case: tuple[Placement, ExpertLoads]) -> None:
    placement, loads = case
    everything = {
        (layer_id, expert) for layer_id, tokens in loads.layers.items() for expert in range(len(tokens))
    }
    left_without = [
        {
            (layer_id, expert)
            for layer_id, shares in placement.layers.items()
            for rank, share in enumerate(shares)
            if rank != lost
            for expert in share
        }
        for lost in range(placement.ep_size)
    ]
    any_tokens = any(map(any, loads.layers.values()))

    def traffic(pairs: set[tuple[int, int]]) -> float:
        weights = {pair: loads.layers[pair[0]][pair[1]] if any_tokens else 1 for pair in everything}
        return sum(weights[pair] for pair in pairs) / sum(weights.values())

    found = coverage_of(placement, loads)
    always = everything.intersection(*left_without)
    assert found.experts == pytest.approx(len(always) / len(everything))
    assert found.traffic == pytest.approx(traffic(always))
    assert found.worst_traffic == pytest.approx(min(map(traffic, left_without)))
    worst = left_without[found.worst_ep_rank]
    assert found.worst_traffic == pytest.approx(traffic(worst))
    assert found.worst_experts == pytest.approx(len(worst) / len(everything))


def test_coverage_is_told_in_one_sentence() -> None:
    coverage = coverage_of(Placement({1: ((0, 1), (0, 2))}), ExpertLoads({1: (6, 3, 1)}))
    assert str(coverage) == (
        "33.3% of the experts and 60.0% of the recent traffic survive the loss of any one worker; "
        "the loss of ep_rank 0, the worst, leaves 66.7% and 70.0%"
    )
