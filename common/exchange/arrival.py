"""Rows at a worker, from their receipt to their reply. What both implementations of the expert end share.

Shapes: T tokens, R rows, D hidden_size, E_local experts a worker holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import MessageError
from common.exchange import Received, wire
from common.exchange.token_passes import TokenPasses


@dataclass(slots=True, eq=False)
class Arrival:
    """One message of rows.

    Attributes:
        header: what the router said of them.
        rows: [R, D] that travelled at ep_level 2.
        row_scales: [R] float32 of these where they are int8.
        tokens_per_expert: [E_local] of these.
        passes: ep_level 1: all tokens, of which rows are expanded pass by pass.
    """

    header: wire.Header
    rows: Tensor | None
    row_scales: Tensor | None
    tokens_per_expert: Tensor | None
    passes: TokenPasses | None
    received_ns: int
    compute_start_ns: int = 0
    due: Received | None = None

    def received(self, router: int, is_grouped: bool, output: Tensor | None = None) -> Received:
        """What is to be computed now.

        Args:
            router: the number of the router.
            is_grouped: as its step has it.
            output: memory of the reply, [R, D], where there is one already.
        """
        if not self.compute_start_ns:
            self.compute_start_ns = time.monotonic_ns()
        rows, counts = self.rows, self.tokens_per_expert
        if self.passes is not None:
            local = self.passes.expand()
            rows, counts = local.rows, local.tokens_per_expert
        if rows is None or counts is None:
            raise MessageError("a message has neither rows nor tokens")
        header = self.header
        self.due = Received(
            router,
            header.term,
            header.epoch,
            header.step_id,
            header.layer_id,
            header.micro_batch,
            header.round,
            rows,
            self.row_scales,
            counts,
            is_grouped,
            output,
            self,
        )
        return self.due

    def take(self, output: Tensor, received: Received, dtype: torch.dtype) -> Tensor | None:
        """Take the experts' output [R, D]; the body of the reply, or None where another pass is due.

        Rows go home in `dtype`, which is the model's.
        """
        if received is not self.due or not (output is received.output or output.shape == received.rows.shape):
            raise MessageError(
                f"output {tuple(output.shape)} must answer the rows {tuple(received.rows.shape)} that are due"
            )
        self.due = None
        header = self.header
        if self.passes is None:
            body = output if output.dtype == dtype else output.to(dtype)
        elif self.passes.take(output.to(dtype)):
            body, header.rounds = self.passes.total, self.passes.num_passes
        else:
            return None
        header.kind = wire.REPLY
        header.received_ns, header.compute_start_ns = self.received_ns, self.compute_start_ns
        header.compute_end_ns = time.monotonic_ns()
        return body
