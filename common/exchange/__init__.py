"""The exchange: how rows of hidden states reach the routed experts and come back.

One protocol with two ends, driven by messages. It is written for any number of routers and expert workers:
nothing waits across routers, and nobody sends a message only to keep somebody else company. The number of
tokens is fixed within a step, so the step header fixes the size of every message of the step.

Shapes: T tokens, K experts per token, R rows at an expert worker, D hidden_size, E_local experts of a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

ALL_GATHER = 1
"""ep_level 1: every worker gets all tokens and returns one partial sum per token."""
ALL_TO_ALL = 2
"""ep_level 2: only the rows an expert needs travel to it and come back."""


@dataclass(frozen=True, slots=True)
class StepHeader:
    """What an expert worker must know before the rows of a step arrive. Fixed for the whole step.

    Attributes:
        term: the router's term; a worker obeys only terms it has registered with.
        epoch: the membership and placement of the step; the first header of an epoch commits it.
        step_id: grows by one with every step of the term.
        ep_level: ALL_GATHER or ALL_TO_ALL.
        num_tokens: tokens of the router in this step, or in its largest micro-batch.
        micro_batches: parts the step is cut into; each layer is dispatched once per part.
        round_rows: ALL_TO_ALL: most rows one worker's receive buffer holds; more take another round. 0: all.
        chunk_rows: ALL_TO_ALL: most rows of one message, so that a worker computes while more arrive. 0: all.
        pass_rows: ALL_GATHER: most rows a worker expands at once; more take another pass. 0: all.
        is_grouped: whether a worker may run all its experts in one fused call, where it has such a kernel.
    """

    term: int
    epoch: int
    step_id: int
    ep_level: int
    num_tokens: int
    micro_batches: int = 1
    round_rows: int = 0
    chunk_rows: int = 0
    pass_rows: int = 0
    is_grouped: bool = True


@dataclass(frozen=True, slots=True)
class RowOrigins:
    """Whose rows a micro-batch holds: what chooses among the replicas of an expert, and nothing else.

    Attributes:
        request_keys: [T] int64, common.replica_choice.request_key of each row's request.
        positions: [T] int64, the row's place in its sequence.
    """

    request_keys: Tensor
    positions: Tensor


@dataclass(slots=True)
class Extra:
    """What did not fit and was done all the same, since the exchange was made.

    Attributes:
        rounds: ALL_TO_ALL: messages beyond the first to one worker, because its buffer was full.
        passes: ALL_GATHER: passes beyond the first of one worker, because of the bound on expanded rows.
    """

    rounds: int = 0
    passes: int = 0


@dataclass(slots=True)
class Dispatched:
    """Rows in flight: what `combine` needs to bring them home. Owned by the exchange that made it.

    Attributes:
        layer_id: the MoE layer.
        micro_batch: which part of the step.
        num_tokens: T, rows of the `hidden_states` that were dispatched.
    """

    layer_id: int
    micro_batch: int
    num_tokens: int


@dataclass(slots=True)
class Received:
    """Rows that arrived for the experts of one layer. Valid until `reply`, which gives the buffer back.

    Attributes:
        router: which router sent them, as the expert end numbers its links.
        term: the router's term.
        epoch: the membership and placement the rows belong to.
        step_id: the router's step.
        layer_id: the MoE layer.
        micro_batch: which part of the step.
        round: 0, or more where the rows did not fit one buffer.
        rows: [R, D] in the model's dtype, or int8, sorted by local expert.
        row_scales: [R] float32 where rows are int8 and stand for rows * row_scales, else None.
        tokens_per_expert: [E_local] int64 on the CPU; sums to R. May hold zeros, and R may be 0.
        is_grouped: as in the step's header.
        output: [R, D] in the model's dtype: memory of the reply that the experts may write to, which saves a
            copy. None where there is none.
    """

    router: int
    term: int
    epoch: int
    step_id: int
    layer_id: int
    micro_batch: int
    round: int
    rows: Tensor
    row_scales: Tensor | None
    tokens_per_expert: Tensor
    is_grouped: bool = True
    output: Tensor | None = None
    handle: object = field(default=None, repr=False)
    """Private to the exchange."""


class RouterExchange(Protocol):
    """The router's end."""

    extra: Extra

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        """Announce a step on every link.

        Args:
            header: what is the same for the whole step.
            origins: of each micro-batch; without them the first replica of an expert serves every row.

        Raises:
            WorkerLost: a link failed while sending.
        """

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        """Send rows to the experts and return at once.

        At ALL_TO_ALL, rows of a layer whose experts are all W8A8 are quantised before they leave, once per
        token: what the experts would do with each of them, and do where rows come through windows.

        Args:
            layer_id: the MoE layer.
            micro_batch: which part of the step.
            hidden_states: [T, D] in the model's dtype. T may be 0.
            topk_ids: [T, K] int64, checkpoint indices of the chosen experts, distinct within a row.
            topk_weights: [T, K] float32.

        Raises:
            WorkerLost: a link failed while sending.
        """

    def combine(self, dispatched: Dispatched) -> Tensor:
        """Wait for the experts and return their weighted sum, [T, D] float32, which is then the caller's.

        Each product of weight and row is rounded in float32, the products of a token are added in slot order
        in float64, and the sum is rounded once: the same bits for any number of workers and at both levels.

        Raises:
            WorkerLost: a worker died, or did not answer within its deadline.
        """

    def close(self) -> None:
        """Drop every link. Never blocks on a dead peer."""


class ExpertExchange(Protocol):
    """The expert worker's end. One thread calls receive and reply."""

    def receive(self, timeout_s: float | None = None) -> Received | None:
        """Wait for rows from any router.

        None when `timeout_s` passed, the exchange was closed, or rows came that it has answered by itself.
        """

    def reply(self, output: Tensor, received: Received) -> None:
        """Send the experts' output home, in any order.

        Args:
            output: [R, D] in floating point, row i belongs to row i of `received.rows`. It may be
                `received.output` itself.
            received: what `receive` returned; its buffer is reused afterwards.
        """

    def close(self) -> None:
        """Drop every link. Never blocks on a dead peer."""
