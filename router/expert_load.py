"""How often each expert was chosen: the router sees every choice, so the counts are exact.

Shapes: T tokens, K experts per token, E routed experts, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.exchange import Dispatched, Extra, RouterExchange, RowOrigins, StepHeader

MOST_UNCOUNTED = 1 << 12
"""Choices that are kept before they are counted: those of one decode step take as long as those of many."""


class ExpertLoads:
    """Choices per layer and expert since the engine started. Owned by the thread that steps."""

    def __init__(self, n_routed_experts: int, moe_layer_ids: Iterable[int]) -> None:
        self._rows = {layer_id: row for row, layer_id in enumerate(moe_layer_ids)}
        self._settled = torch.zeros(len(self._rows), n_routed_experts, dtype=torch.int64)  # [L, E]
        self._of_step: list[tuple[int, Tensor]] = []
        self._uncounted: list[tuple[int, Tensor]] = []
        self._num_uncounted = 0

    def begin_step(self) -> None:
        """Forget the choices of a step that did not settle: it is computed again."""
        self._of_step.clear()

    def note(self, layer_id: int, topk_ids: Tensor) -> None:  # [T, K]
        """Keep the choices of a micro-batch in one layer until the step settles."""
        self._of_step.append((self._rows[layer_id], topk_ids))

    def settle(self) -> None:
        """The step is computed: its choices count."""
        self._uncounted += self._of_step
        self._num_uncounted += sum(topk_ids.numel() for _, topk_ids in self._of_step)
        self._of_step.clear()
        if self._num_uncounted >= MOST_UNCOUNTED:
            self._count()

    def layers(self) -> dict[int, list[int]]:
        """Counts by layer, in the order of the experts."""
        self._count()
        return {layer_id: self._settled[row].tolist() for layer_id, row in self._rows.items()}

    def _count(self) -> None:
        if not self._uncounted:
            return
        num_experts = self._settled.shape[1]
        choices = torch.cat([(row * num_experts + ids).reshape(-1) for row, ids in self._uncounted])
        counts = torch.bincount(choices, minlength=self._settled.numel())
        self._settled += counts.to(self._settled.device).view_as(self._settled)
        self._uncounted.clear()
        self._num_uncounted = 0


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
        """Begin to count a step, and pass on."""
        self._loads.begin_step()
        self._exchange.begin(header, origins)

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Note the choices, topk_ids [T, K], and pass on."""
        self._loads.note(layer_id, topk_ids)
        return self._exchange.dispatch(layer_id, micro_batch, hidden_states, topk_ids, topk_weights)

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Pass on."""
        return self._exchange.combine(dispatched)

    def close(self) -> None:
        """Pass on."""
        self._exchange.close()
