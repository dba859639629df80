"""What an expert worker checks before it uses a message. Pure; every failure is a MessageError.

Shapes: T tokens, K experts per token, E_local experts a worker holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from common.errors import MessageError
from common.exchange import ALL_GATHER, ALL_TO_ALL, StepHeader, wire
from common.exchange.routing import RowShape


class RouterLeft(MessageError):
    """The router said goodbye: no failure, but there is nothing to receive any more."""


def check_origin(header: wire.Header, term: int, epoch: int, incarnation: int) -> None:
    """Refuse a message of another router, membership or start of the worker."""
    if header.kind == wire.GOODBYE:  # it may come before a step has told the router's end its epoch
        raise RouterLeft("the router said goodbye")
    found, wanted = (header.term, header.epoch, header.incarnation), (term, epoch, incarnation)
    if found != wanted:
        raise MessageError(f"(term, epoch, incarnation) is {found}, this link belongs to {wanted}")


def check_step(header: wire.Header, previous: StepHeader | None) -> StepHeader:
    """Take a STEP in; steps only grow."""
    if not wire.HEADER_BYTES <= header.capacity_bytes <= wire.MAX_BYTES:
        raise MessageError(f"a step announces buffers of {header.capacity_bytes} bytes")
    if header.ep_level not in (ALL_GATHER, ALL_TO_ALL):
        raise MessageError(f"a step announces ep_level {header.ep_level}: it must be 1 or 2")
    if previous is not None and header.step_id <= previous.step_id:
        raise MessageError(f"step {header.step_id} came after step {previous.step_id}")
    return StepHeader(
        header.term,
        header.epoch,
        header.step_id,
        header.ep_level,
        header.num_tokens,
        header.micro_batches,
        pass_rows=header.pass_rows,
        is_grouped=bool(header.is_grouped),
    )


def check_rows(
    header: wire.Header, step: StepHeader | None, experts: Mapping[int, tuple[int, ...]], shape: RowShape
) -> None:
    """Refuse ROWS that do not belong to the step that was announced, or are not what the experts take."""
    if step is None or header.step_id != step.step_id or header.ep_level != step.ep_level:
        raise MessageError(f"rows of step {header.step_id} came outside of that step")
    if header.layer_id not in experts or not 0 <= header.micro_batch < step.micro_batches:
        raise MessageError(f"no rows belong to layer {header.layer_id}, micro-batch {header.micro_batch}")
    if header.num_tokens > step.num_tokens:
        raise MessageError(f"{header.num_tokens} tokens came in a step of {step.num_tokens}")
    takes_int8 = header.ep_level == ALL_TO_ALL and header.layer_id in shape.int8_layers
    takes_int8 = takes_int8 and not header.is_window  # there the worker quantises, with the same bits
    if bool(header.is_int8) != takes_int8:
        forms = {False: str(shape.dtype).removeprefix("torch."), True: "int8"}
        raise MessageError(
            f"rows of layer {header.layer_id} came in {forms[not takes_int8]}, but its experts here take "
            f"{forms[takes_int8]}: give router and expert workers the same checkpoint"
        )


def check_slot_keys(slot_keys: Tensor) -> None:
    """Refuse slot keys [T, K] that belong to no worker."""
    if slot_keys.numel() and int(slot_keys.min()) < 0:
        raise MessageError(f"slot key {int(slot_keys.min())} was sent: keys begin at 0")


def check_counts(counts: Tensor, num_rows: int) -> None:
    """Refuse rows per expert [E_local] that do not sum to the rows announced."""
    rows = counts.tolist()  # a short list is added up sooner than a tensor
    if min(rows, default=0) < 0 or sum(rows) != num_rows:
        raise MessageError(f"rows per expert {rows} do not sum to {num_rows}")
