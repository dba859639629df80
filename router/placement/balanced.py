"""A placement that spreads the load evenly and keeps the replicas of an expert on different workers.

E routed experts, N redundant ones (replicas beyond the first, of all workers together), W expert workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from common.errors import ConfigError
from common.placement import Placement, contiguous
from router.placement.anti_affinity import separate
from router.placement.eplb import Slots, rebalance
from router.placement.load import ExpertLoads, uniform

COVERED = 2
"""Replicas of an expert that outlive any one worker, if they are on different ones."""


def place(
    n_routed_experts: int,
    moe_layer_ids: Collection[int],
    ep_size: int,
    redundant_experts: int = 0,
    loads: ExpertLoads | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Placement:
    """Place the experts: by load where it is known or replicas are asked for, else in contiguous blocks.

    Args:
        loads: tokens per expert of all MoE layers; None before any were counted.
        redundant_experts, num_groups, num_nodes: as in balanced.

    Raises:
        ConfigError: workers, experts and redundant experts do not fit together.
    """
    if loads is None and redundant_experts == 0:
        return contiguous(n_routed_experts, ep_size, moe_layer_ids)
    known = loads or uniform(n_routed_experts, moe_layer_ids)
    return balanced(known, ep_size, redundant_experts, num_groups, num_nodes)


def balanced(
    loads: ExpertLoads, ep_size: int, redundant_experts: int, num_groups: int = 1, num_nodes: int = 1
) -> Placement:
    """Place the experts of every layer by their loads.

    With N >= E every expert has at least two replicas; otherwise load alone decides who has some.

    Args:
        loads: tokens per expert of every MoE layer; a layer without any is planned as if all were equal.
        ep_size: expert workers; the first W / num_nodes stand on the first node, and so on.
        redundant_experts: N.
        num_groups: n_group of the checkpoint's gate; a group's experts stay on one node where the numbers of
            groups, workers and replicas allow it.
        num_nodes: nodes, with equally many workers each.

    Raises:
        ConfigError: the slots cannot be dealt out evenly, or replicas of one expert would have to meet.
    """
    layers: dict[int, tuple[tuple[int, ...], ...]] = {}
    planned: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
    for layer_id, tokens in loads.layers.items():
        if tokens not in planned:
            check_redundancy(len(tokens), redundant_experts, ep_size)
            planned[tokens] = _place_layer(tokens, ep_size, redundant_experts, num_groups, num_nodes)
        layers[layer_id] = planned[tokens]
    return Placement(layers)


def check_redundancy(n_routed_experts: int, redundant_experts: int, ep_size: int) -> None:
    """Check that E + N slots can be dealt out evenly, with every replica of an expert on its own worker.

    Raises:
        ConfigError: they cannot, or ep_size is not in [1, E + N].
    """
    if not 1 <= ep_size <= n_routed_experts + redundant_experts:
        raise ConfigError(
            f"{ep_size} expert workers cannot share {n_routed_experts} routed and {redundant_experts} "
            f"redundant experts: start between 1 and {n_routed_experts + redundant_experts}"
        )
    most = n_routed_experts * (ep_size - 1)
    if not 0 <= redundant_experts <= most:
        raise ConfigError(
            f"ExpertMesh.redundantExperts is {redundant_experts}, but {ep_size} workers hold each of "
            f"{n_routed_experts} routed experts at most once: choose between 0 and {most}"
        )
    fitting = fitting_redundancy(n_routed_experts, redundant_experts, ep_size)
    if fitting != redundant_experts:
        fewer = f"{fitting - ep_size} or " if fitting >= ep_size else ""
        raise ConfigError(
            f"ExpertMesh.redundantExperts is {redundant_experts}, but {ep_size} workers cannot share "
            f"{n_routed_experts} + {redundant_experts} experts evenly: choose {fewer}{fitting}"
        )


def fitting_redundancy(n_routed_experts: int, redundant_experts: int, ep_size: int) -> int:
    """The number of redundant experts, N or the next above, that W workers can share evenly.

    A fleet that lost a worker takes it: slots that would stay empty hold replicas. Where N is more than the
    workers can keep apart, it is the most that they can.
    """
    rounded = redundant_experts + -(n_routed_experts + redundant_experts) % ep_size
    return min(rounded, n_routed_experts * (ep_size - 1))


def _place_layer(
    tokens: Sequence[int], ep_size: int, redundant_experts: int, num_groups: int, num_nodes: int
) -> tuple[tuple[int, ...], ...]:
    num_slots = len(tokens) + redundant_experts
    # Replicas that stay on a node have only its workers to be kept apart on.
    if (
        num_groups % num_nodes != 0
        or ep_size % num_nodes != 0
        or num_slots > len(tokens) * (ep_size // num_nodes)
    ):
        num_groups = num_nodes = 1
    weights = [float(count) for count in tokens] if any(tokens) else [1.0] * len(tokens)
    bounds = (min(num_slots // len(tokens), COVERED), ep_size // num_nodes)
    slots = rebalance(weights, num_slots, num_groups, num_nodes, ep_size, bounds)
    shares: list[tuple[int, ...]] = []
    for node in range(num_nodes):
        shares += _share_node(_node_shares(slots, node, num_nodes, ep_size), weights)
    return tuple(shares)


def _node_shares(slots: Slots, node: int, num_nodes: int, ep_size: int) -> list[tuple[int, ...]]:
    size = len(slots.experts) // ep_size
    workers = ep_size // num_nodes
    return [
        slots.experts[worker * size : (worker + 1) * size]
        for worker in range(node * workers, (node + 1) * workers)
    ]


def _share_node(shares: list[tuple[int, ...]], weights: Sequence[float]) -> list[tuple[int, ...]]:
    """Keep the replicas of a node apart, and its heaviest worker as light as dealing in turn would."""
    counts = Counter(expert for share in shares for expert in share)
    apart = separate(shares, {expert: weights[expert] / count for expert, count in counts.items()})
    # Packing is greedy: now and then, in small layers, it does worse than no thought at all.
    candidates = (apart, in_turn(sorted(counts), sum(counts.values()), len(shares)))
    best = min(candidates, key=lambda candidate: _heaviest(candidate, weights))
    return [tuple(sorted(share)) for share in best]


def in_turn(experts: Sequence[int], num_slots: int, num_workers: int) -> list[list[int]]:
    """Replicate evenly and deal out in turn, whatever the loads are; replicas do not meet."""
    each, more = divmod(num_slots, len(experts))
    row = [expert for index, expert in enumerate(experts) for _ in range(each + (index < more))]
    return [row[worker::num_workers] for worker in range(num_workers)]


def _heaviest(shares: Sequence[Sequence[int]], weights: Sequence[float]) -> float:
    counts = Counter(expert for share in shares for expert in share)
    return max(sum(weights[expert] / counts[expert] for expert in share) for share in shares)
