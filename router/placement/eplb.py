"""Expert-parallel load balancing: how often each expert of a layer is held, and on which device.

The algorithm of EPLB (deepseek-ai/EPLB, described in its README), for one layer. Sums and quotients are
rounded to float32, as there, so that ties fall alike.

E experts, R slots, G expert groups, N nodes, P devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from common.errors import ConfigError

FULL = float("inf")
HELD_OFTEN_ENOUGH = -1.0
_float32 = Struct("f")


@dataclass(frozen=True, slots=True)
class Slots:
    """What the R slots of a layer hold; device p has the slots from p * R/P up to (p + 1) * R/P.

    Attributes:
        experts: [R] the expert in each slot.
        replicas: [R] which replica of its expert that is, counted from 0.
    """

    experts: tuple[int, ...]
    replicas: tuple[int, ...]

    def of_experts(self) -> tuple[tuple[int, ...], ...]:
        """The slots of each expert, [E][its replicas], by replica."""
        found: dict[int, dict[int, int]] = {expert: {} for expert in sorted(self.experts)}
        for slot, (expert, replica) in enumerate(zip(self.experts, self.replicas, strict=True)):
            found[expert][replica] = slot
        return tuple(tuple(slots[replica] for replica in sorted(slots)) for slots in found.values())


def rebalance(
    loads: Sequence[float],
    num_slots: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    bounds: tuple[int, int] | None = None,
) -> Slots:
    """Fill the slots of one layer: hierarchically where the groups can be dealt to the nodes, else globally.

    Hierarchically means that the experts of a group stay on one node.

    Args:
        loads: [E] tokens per expert, none negative.
        bounds: fewest and most replicas of an expert; None is 1 and no bound.

    Raises:
        ConfigError: the numbers do not divide, or the bounds leave slots empty or too few.
    """
    if num_groups % num_nodes != 0:
        num_groups = num_nodes = 1
    _check(len(loads), num_slots, num_groups, num_nodes, num_devices)
    order = _experts_by_node(loads, num_groups, num_nodes)
    share = len(loads) // num_nodes
    experts: list[int] = []
    replicas: list[int] = []
    for node in range(num_nodes):
        own = order[node * share : (node + 1) * share]
        held = _fill_node(
            [loads[expert] for expert in own], num_slots // num_nodes, num_devices // num_nodes, bounds
        )
        experts += [own[expert] for expert in held.experts]
        replicas += held.replicas
    return Slots(tuple(experts), tuple(replicas))


def _check(num_experts: int, num_slots: int, num_groups: int, num_nodes: int, num_devices: int) -> None:
    rules = [
        (num_devices % num_nodes, f"{num_devices} devices cannot be dealt out evenly to {num_nodes} nodes"),
        (num_slots % num_devices, f"{num_slots} slots cannot be dealt out evenly to {num_devices} devices"),
        (num_experts % num_groups, f"{num_experts} experts cannot form {num_groups} equal groups"),
        (max(num_experts - num_slots, 0), f"{num_slots} slots are too few for {num_experts} experts"),
    ]
    for rest, sentence in rules:
        if rest != 0:
            raise ConfigError(f"{sentence}: change the number of redundant experts or of workers")


def _experts_by_node(loads: Sequence[float], num_groups: int, num_nodes: int) -> list[int]:
    """The experts in the order of their nodes, [E]."""
    size = len(loads) // num_groups
    group_loads = []
    for group in range(num_groups):
        total = 0.0
        for load in loads[group * size : (group + 1) * size]:
            total = _single(total + _single(load))
        group_loads.append(total)
    places = pack(group_loads, num_nodes)
    groups = sorted(range(num_groups), key=places.__getitem__)
    return [group * size + member for group in groups for member in range(size)]


def _fill_node(
    loads: Sequence[float], num_slots: int, num_devices: int, bounds: tuple[int, int] | None
) -> Slots:
    least, most = bounds or (1, num_slots)
    chosen = replicate(loads, num_slots, least, most)
    counts = [0] * len(loads)
    for expert in chosen.experts:
        counts[expert] += 1
    slot_loads = [_single(_single(loads[expert]) / counts[expert]) for expert in chosen.experts]
    places = pack(slot_loads, num_devices)
    order = sorted(range(num_slots), key=places.__getitem__)
    return Slots(
        tuple(chosen.experts[slot] for slot in order), tuple(chosen.replicas[slot] for slot in order)
    )


def pack(loads: Sequence[float], num_packs: int) -> list[tuple[int, int]]:
    """Deal items out to packs of equal size, heaviest first, each to the lightest pack with room.

    Returns:
        For every item its pack, and its rank in that pack.
    """
    size = len(loads) // num_packs
    if size == 1:
        return [(item, 0) for item in range(num_packs)]
    totals = [0.0] * num_packs
    held = [0] * num_packs
    places = [(0, 0)] * len(loads)
    for item in sorted(range(len(loads)), key=lambda item: -_single(loads[item])):
        lightest = min(range(num_packs), key=totals.__getitem__)
        places[item] = (lightest, held[lightest])
        held[lightest] += 1
        total = _single(totals[lightest] + _single(loads[item]))
        totals[lightest] = FULL if held[lightest] == size else total
    return places


def replicate(loads: Sequence[float], num_slots: int, least: int, most: int) -> Slots:
    """Give every expert `least` slots, and each further slot to the expert with the most load per replica.

    Raises:
        ConfigError: that cannot fill the slots.
    """
    num_experts = len(loads)
    if not least * num_experts <= num_slots <= most * num_experts:
        raise ConfigError(
            f"{num_slots} slots cannot hold {num_experts} experts between {least} and {most} times each: "
            "change the number of redundant experts or of workers"
        )
    experts = list(range(num_experts)) * least
    replicas = [replica for replica in range(least) for _ in range(num_experts)]
    counts = [least] * num_experts
    singles = [_single(load) for load in loads]
    scores = [_single(load / least) if least < most else HELD_OFTEN_ENOUGH for load in singles]
    for _ in range(num_slots - len(experts)):
        expert = max(range(num_experts), key=scores.__getitem__)
        experts.append(expert)
        replicas.append(counts[expert])
        counts[expert] += 1
        more = counts[expert] < most
        scores[expert] = _single(singles[expert] / counts[expert]) if more else HELD_OFTEN_ENOUGH
    return Slots(tuple(experts), tuple(replicas))


def _single(value: float) -> float:
    rounded: float = _float32.unpack(_float32.pack(value))[0]
    return rounded
