"""What survives the loss of any one expert worker: how many experts, and how much of the recent traffic."""

from __future__ import annotations

from dataclasses import dataclass

from common.placement import Placement
from router.placement.load import ExpertLoads


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares between 0 and 1, over all layers.

    Attributes:
        experts: of the (layer, expert) pairs, those that have a replica left whichever worker is lost.
        traffic: of the tokens' choices, those of such pairs; without traffic, the share of experts.
        worst_ep_rank: the worker whose loss leaves the least traffic.
        worst_experts: of the pairs, those that have a replica left when that worker is lost.
        worst_traffic: of the choices, those of these pairs.
    """

    experts: float
    traffic: float
    worst_ep_rank: int
    worst_experts: float
    worst_traffic: float

    def __str__(self) -> str:
        return (
            f"{self.experts:.1%} of the experts and {self.traffic:.1%} of the recent traffic survive the "
            f"loss of any one worker; the loss of ep_rank {self.worst_ep_rank}, the worst, leaves "
            f"{self.worst_experts:.1%} and {self.worst_traffic:.1%}"
        )


def coverage_of(placement: Placement, loads: ExpertLoads) -> Coverage:
    """Measure a placement of at least one layer by recent loads of the same layers."""
    num_pairs = num_tokens = 0
    # What stands on one worker alone goes with it; what has replicas elsewhere outlives any one.
    lost_pairs = [0] * placement.ep_size
    lost_tokens = [0] * placement.ep_size
    for layer_id, tokens in loads.layers.items():
        num_pairs += len(tokens)
        num_tokens += sum(tokens)
        for expert, ep_ranks in placement.replicas_of(layer_id).items():
            if len(ep_ranks) == 1:
                lost_pairs[ep_ranks[0]] += 1
                lost_tokens[ep_ranks[0]] += tokens[expert]
    lost = lost_tokens if num_tokens else lost_pairs
    whole = num_tokens or num_pairs
    worst = max(range(placement.ep_size), key=lost.__getitem__)
    return Coverage(
        experts=1 - sum(lost_pairs) / num_pairs,
        traffic=1 - sum(lost) / whole,
        worst_ep_rank=worst,
        worst_experts=1 - lost_pairs[worst] / num_pairs,
        worst_traffic=1 - lost[worst] / whole,
    )
