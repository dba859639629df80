"""Which expert worker holds which routed experts. Pure and torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Placement:
    """For every MoE layer, the routed experts of each expert worker in the order it holds them.

    An expert may have replicas: it then stands with several workers, once with each.

    Attributes:
        layers: layer_id -> (experts of ep_rank 0, experts of ep_rank 1, ...), checkpoint indices.
    """

    layers: Mapping[int, tuple[tuple[int, ...], ...]]

    @property
    def ep_size(self) -> int:
        """Expert workers in the group."""
        return len(next(iter(self.layers.values()), ()))

    def experts_of(self, ep_rank: int) -> dict[int, tuple[int, ...]]:
        """The experts that worker `ep_rank` holds: layer_id -> checkpoint indices."""
        return {layer_id: owners[ep_rank] for layer_id, owners in self.layers.items()}

    def of_ranks(self, ep_ranks: Iterable[int]) -> Placement:
        """What is left of it with these workers alone, in this order."""
        ranks = tuple(ep_ranks)
        return Placement(
            {layer_id: tuple(owners[rank] for rank in ranks) for layer_id, owners in self.layers.items()}
        )

    def covers(self, other: Placement) -> bool:
        """Whether somebody holds every expert that somebody holds in another one of the same layers."""
        return all(
            set().union(*owners) <= set().union(*self.layers[layer_id])
            for layer_id, owners in other.layers.items()
        )

    def replicas_of(self, layer_id: int) -> dict[int, tuple[int, ...]]:
        """The workers that hold each expert of a layer: checkpoint index -> ep_ranks, ascending."""
        found: dict[int, tuple[int, ...]] = {}
        for ep_rank, experts in enumerate(self.layers[layer_id]):
            for expert in experts:
                found[expert] = (*found.get(expert, ()), ep_rank)
        return found


def contiguous(n_routed_experts: int, ep_size: int, moe_layer_ids: Iterable[int]) -> Placement:
    """Deal the experts out in blocks, worker 0 first; shares differ by at most one expert.

    Raises:
        ConfigError: ep_size is not in [1, n_routed_experts].
    """
    if not 1 <= ep_size <= n_routed_experts:
        raise ConfigError(
            f"{ep_size} expert workers cannot share {n_routed_experts} routed experts: "
            f"start between 1 and {n_routed_experts}"
        )
    share, extra = divmod(n_routed_experts, ep_size)
    starts = [rank * share + min(rank, extra) for rank in range(ep_size + 1)]
    blocks = tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in range(ep_size))
    return Placement(dict.fromkeys(moe_layer_ids, blocks))
