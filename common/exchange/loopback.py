"""Both ends of the exchange in one process: one-process serving and unit tests.

Shapes: T tokens, K experts per token, R rows, D hidden_size, E_local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from common import int8_rows
from common.errors import LinkError
from common.exchange import Dispatched, Extra, RowOrigins, StepHeader
from common.exchange.routing import SortedRows, layer_table, route_slots, weighted_sum
from common.exchange.sent_rows import QuantizeRows, rows_to_send

Compute = Callable[[int, Tensor, Tensor | None, Tensor, bool], Tensor]
"""(layer_id, rows [R, D], row_scales [R], tokens_per_expert [E_local], is_grouped) -> [R, D]."""


@dataclass(slots=True)
class _Waiting(Dispatched):
    """Rows whose experts run in `combine`."""

    hidden_states: Tensor
    sorted_rows: SortedRows
    topk_weights: Tensor


class LoopbackExchange:
    """A RouterExchange that runs all experts itself, when their sum is asked for."""

    def __init__(
        self,
        compute: Compute,
        experts: Mapping[int, tuple[int, ...]],
        int8_layers: frozenset[int] = frozenset(),
        quantize_rows: QuantizeRows = int8_rows.quantize_rows,
    ) -> None:
        """Keep everything here.

        Args:
            compute: the experts.
            experts: layer_id -> checkpoint indices, in local order.
            int8_layers: layers whose experts are given int8 rows and scales.
            quantize_rows: makes these, once per token.
        """
        self.extra = Extra()
        self._compute = compute
        self._tables = {layer_id: layer_table([own]) for layer_id, own in experts.items()}
        self._num_local = {layer_id: len(own) for layer_id, own in experts.items()}
        self._int8_layers, self._quantize_rows = int8_layers, quantize_rows
        self._is_grouped = True
        self._is_closed = False

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        """Nothing to announce."""
        self._check_open()
        self._is_grouped = header.is_grouped

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Sort the rows: hidden_states [T, D], topk_ids and topk_weights [T, K]."""
        self._check_open()
        # Rows are sorted and summed on the host: not every device has float64.
        sorted_rows = route_slots(topk_ids.cpu(), self._tables[layer_id])
        return _Waiting(
            layer_id, micro_batch, hidden_states.shape[0], hidden_states, sorted_rows, topk_weights.cpu()
        )

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Run the experts and return their weighted sum, [T, D] float32."""
        self._check_open()
        if not isinstance(dispatched, _Waiting):
            raise LinkError("these rows were dispatched by another exchange: combine them there")
        sorted_rows = dispatched.sorted_rows
        layer_id, hidden_states = dispatched.layer_id, dispatched.hidden_states
        quantize = self._quantize_rows if layer_id in self._int8_layers else None
        token_of = sorted_rows.token_of.to(hidden_states.device)
        rows, scales = rows_to_send(hidden_states, token_of, quantize).gathered()
        counts = sorted_rows.counts[0, : self._num_local[layer_id]]
        output = self._compute(layer_id, rows, scales, counts, self._is_grouped)
        combined = weighted_sum([output.cpu()], sorted_rows.position_of, dispatched.topk_weights)
        return combined.to(hidden_states.device)

    def close(self) -> None:
        """Refuse further steps."""
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkError("the exchange is closed: connect the next epoch")
