"""How often each expert was chosen: the router sees every choice, so the counts are exact.

Shapes: T tokens, K experts per token, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.exchange import Dispatched, Extra, RouterExchange, RowOrigins, StepHeader


class ExpertLoads:
    """Choices per layer and expert since the engine started. Owned by the thread that steps."""

    def __init__(self, n_routed_experts: int, moe_layer_ids: Iterable[int]) -> None:
        self._counts = {
            layer_id: torch.zeros(n_routed_experts, dtype=torch.int64) for layer_id in moe_layer_ids
        }

    def count(self, layer_id: int, topk_ids: Tensor) -> None:  # [T, K]
        """Count the choices of a micro-batch in one layer."""
        counts = self._counts[layer_id]
        counts += torch.bincount(topk_ids.reshape(-1), minlength=counts.numel()).to(counts.device)

    def layers(self) -> dict[int, list[int]]:
        """Counts by layer, in the order of the experts."""
        return {layer_id: counts.tolist() for layer_id, counts in self._counts.items()}


class CountedExchange:
    """A RouterExchange that counts what goes through it."""

    def __init__(self, exchange: RouterExchange, loads: ExpertLoads) -> None:
        self._exchange = exchange
        self._loads = loads

    @property
    def extra(self) -> Extra:
        """As the exchange counts it."""
        return self._exchange.extra

    @extra.setter
    def extra(self, extra: Extra) -> None:
        self._exchange.extra = extra

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        """Pass on."""
        self._exchange.begin(header, origins)

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Pass on, then count while the rows are away: topk_ids [T, K]."""
        dispatched = self._exchange.dispatch(layer_id, micro_batch, hidden_states, topk_ids, topk_weights)
        self._loads.count(layer_id, topk_ids)
        return dispatched

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Pass on."""
        return self._exchange.combine(dispatched)

    def close(self) -> None:
        """Pass on."""
        self._exchange.close()
