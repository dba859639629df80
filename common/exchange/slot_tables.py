"""The router's view of a placement: where each chosen expert is computed, and how rows are cut.

Shapes: T tokens, K experts per token, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.errors import MessageError
from common.exchange import Extra, RowOrigins, StepHeader, wire
from common.exchange.routing import LayerTable, SortedRows, layer_table, place_slots, route_slots
from common.placement import Placement
from common.replica_choice import row_key


class SlotTables:
    """The tables of all layers, and whose rows the step in hand holds."""

    def __init__(self, placement: Placement) -> None:
        self.tables = {layer_id: layer_table(owners) for layer_id, owners in placement.layers.items()}
        self._origins: Sequence[RowOrigins] = ()

    @property
    def most_local(self) -> int:
        """Most experts that any worker holds in any layer, at least 1."""
        return max((table.most_local for table in self.tables.values()), default=1)

    def begin(self, origins: Sequence[RowOrigins]) -> None:
        """Take the origins of the next step's micro-batches, to the host that sorts by them."""
        self._origins = [RowOrigins(one.request_keys.cpu(), one.positions.cpu()) for one in origins]

    def table(self, layer_id: int) -> LayerTable:
        """The table of a layer. Raises MessageError where it has none."""
        if layer_id not in self.tables:
            raise MessageError(f"layer {layer_id} has no experts in this placement")
        return self.tables[layer_id]

    def place(self, layer_id: int, micro_batch: int, topk_ids: Tensor) -> Tensor:  # [T, K] -> [T, K]
        """The slot keys of the chosen experts. Raises MessageError where no worker holds one of them."""
        return place_slots(topk_ids, self.table(layer_id), self._row_keys(layer_id, micro_batch))

    def route(self, layer_id: int, micro_batch: int, topk_ids: Tensor) -> SortedRows:  # [T, K]
        """The rows of the chosen experts in the order of their keys. Raises MessageError as `place` does."""
        return route_slots(topk_ids, self.table(layer_id), self._row_keys(layer_id, micro_batch))

    def _row_keys(self, layer_id: int, micro_batch: int) -> Tensor | None:  # [T]
        """What chooses among replicas, where there are any to choose from."""
        if not self._origins or not self.table(layer_id).has_replicas:
            return None
        origin = self._origins[micro_batch]
        return row_key(origin.request_keys, origin.positions, layer_id)


def message_rows(step: StepHeader, num_experts_per_tok: int) -> int:
    """ALL_TO_ALL: most rows of one message to one worker, at least 1."""
    bounds = [bound for bound in (step.round_rows, step.chunk_rows) if bound > 0]
    return max(min([*bounds, step.num_tokens * num_experts_per_tok]), 1)


def buffer_rows(step: StepHeader, num_experts_per_tok: int) -> int:
    """Rows of a receive buffer of the step's size class: no class is smaller than its messages."""
    most = wire.size_class(step.num_tokens) * num_experts_per_tok
    return min(wire.size_class(message_rows(step, num_experts_per_tok)), most)


def count_extra_rounds(extra: Extra, step: StepHeader, sorted_rows: SortedRows) -> None:
    """Count the rounds that workers need because their buffers are full."""
    if step.round_rows > 0:
        for worker in range(len(sorted_rows.ends)):
            begin, end = sorted_rows.span(worker)
            extra.rounds += max(-(-(end - begin) // step.round_rows) - 1, 0)
