"""Decides what each step computes: continuous batching with chunked prefill. Pure and torch-free.

First come, first served: the running sequences are always the oldest ones, in the order of their arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Row
from dataclasses import dataclass

from common.errors import ConfigError, RequestError
from router.block_allocator import BlockAllocator
from router.plan import Chunk, Plan
from router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and a sequence.

    Attributes:
        block_size: tokens per KV block.
        max_batch_size: most sequences that run at a time.
        max_prefill_tokens: most tokens of prompts (and of answers that are replayed) in one step.
        max_seq_len: most tokens of prompt and answer.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_prefill_tokens: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class Settled:
    """One new token. `finish_reason` is None while the sequence goes on, else "stop" or "length"."""

    sequence: Sequence
    token_id: int
    finish_reason: str | None


class Scheduler:
    """The waiting and the running sequences, and the blocks they hold.

    One step is `schedule`, computing the plan, `settle`. A step that failed is planned again as it was, less
    what was aborted meanwhile: until a plan has settled, its sequences keep their tokens and their blocks.
    """

    def __init__(self, limits: Limits) -> None:
        room = limits.num_blocks * limits.block_size
        if limits.max_seq_len > room:
            raise ConfigError(
                f"sequences of {limits.max_seq_len} tokens do not fit a cache of {room}: "
                "lower maxSeqLen or give the cache more memory"
            )
        least = min(limits.block_size, limits.max_batch_size, limits.max_prefill_tokens)
        if least < 1 or limits.max_seq_len < 2:
            raise ConfigError(
                f"{limits} leaves no room for one sequence: every limit must be at least 1, max_seq_len 2"
            )
        self.limits = limits
        self.num_preemptions = 0
        self._blocks = BlockAllocator(limits.num_blocks)
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: dict[str, Sequence] = {}
        self._unsettled: Plan | None = None

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or were preempted."""
        return len(self._waiting)

    @property
    def num_blocks_used(self) -> int:
        """KV blocks that are held."""
        return self._blocks.num_used

    @property
    def has_work(self) -> bool:
        """Whether the next plan has chunks."""
        return bool(self._running or self._waiting)

    @property
    def is_unsettled(self) -> bool:
        """Whether the next plan is one that was given before."""
        return self._unsettled is not None

    def submit(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises:
            RequestError: it can never run, or its id is taken.
        """
        num_prompt_tokens = sequence.num_prompt_tokens
        if sequence.request_id in self._running or sequence.request_id in self._waiting:
            raise RequestError("request_id", f"request id {sequence.request_id!r} is in use: choose another")
        if num_prompt_tokens < 1:
            raise RequestError("prompt", "the prompt is empty: it must hold at least one token")
        if sequence.max_tokens < 1:
            raise RequestError(
                "sampling.max_tokens", f"max_tokens is {sequence.max_tokens}: it must be at least 1"
            )
        if num_prompt_tokens >= self.limits.max_seq_len:
            raise RequestError(
                "prompt",
                f"the prompt has {num_prompt_tokens} tokens and leaves no room for an answer within "
                f"{self.limits.max_seq_len}: shorten it, or raise maxSeqLen and the memory of the cache",
            )
        self._waiting[sequence.request_id] = sequence

    def abort(self, request_id: str) -> bool:
        """Forget a sequence and free its blocks; False where the id is unknown."""
        if sequence := self._running.pop(request_id, None):
            # Its blocks may belong to another sequence when the plan is computed again.
            rest = self._unsettled.without(sequence) if self._unsettled is not None else None
            self._unsettled = rest if rest is not None and rest.chunks else None
            self._release(sequence)
            return True
        return self._waiting.pop(request_id, None) is not None

    def schedule(self) -> Plan:
        """Plan one step: a token of every sequence that decodes, and prompts up to `max_prefill_tokens`.

        The plan that has not settled yet, if there is one, whatever the limits are now.
        """
        if self._unsettled is not None:
            return self._unsettled
        chunks: list[Chunk] = []
        budget = self.limits.max_prefill_tokens
        # A copy, since growing one sequence may preempt others: always younger ones, which have no chunk yet.
        for sequence in list(self._running.values()):
            if sequence.request_id not in self._running or not self._grow(sequence):
                continue
            if sequence.num_pending == 1:
                chunks.append(_chunk(sequence, 1))
            elif budget > 0:
                chunks.append(_chunk(sequence, min(sequence.num_pending, budget)))
                budget -= chunks[-1].num_tokens
        while budget > 0 and (admitted := self._admit()) is not None:
            chunks.append(_chunk(admitted, min(admitted.num_pending, budget)))
            budget -= chunks[-1].num_tokens
        self._unsettled = Plan(tuple(chunks))
        return self._unsettled

    def settle(self, plan: Plan, token_ids: Row[int]) -> list[Settled]:
        """Take the tokens that a plan gave, and free what has finished.

        Args:
            plan: what `schedule` returned last, computed.
            token_ids: one per sequence of `plan.sampled`, in that order.
        """
        self._unsettled = None
        settled = []
        drawn = iter(token_ids)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            if not chunk.samples:
                continue
            token_id = next(drawn)
            sequence.tokens.append(token_id)
            reason = self._finish_reason(sequence, token_id)
            if reason is not None:
                del self._running[sequence.request_id]
                self._release(sequence)
            settled.append(Settled(sequence, token_id, reason))
        return settled

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if token_id in sequence.stop_token_ids:
            return "stop"
        if sequence.num_generated >= sequence.max_tokens or len(sequence.tokens) >= self.limits.max_seq_len:
            return "length"
        return None

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _admit(self) -> Sequence | None:
        """Move the head of the queue to the running ones, if its tokens and one more fit now."""
        if not self._waiting or len(self._running) >= self.limits.max_batch_size:
            return None
        sequence = next(iter(self._waiting.values()))
        if self._num_blocks_for(len(sequence.tokens) + 1) > self._blocks.num_free:
            return None
        self._waiting.popitem(last=False)
        self._running[sequence.request_id] = sequence
        sequence.block_table = self._blocks.allocate(self._num_blocks_for(len(sequence.tokens)))
        return sequence

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all its tokens; False where it had to be preempted itself."""
        missing = self._num_blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        while missing > self._blocks.num_free:
            youngest = self._preempt_youngest()
            if youngest is sequence:
                return False
        sequence.block_table += self._blocks.allocate(missing)
        return True

    def _preempt_youngest(self) -> Sequence:
        request_id, sequence = self._running.popitem()
        self._release(sequence)
        self._waiting[request_id] = sequence
        self._waiting.move_to_end(request_id, last=False)
        self.num_preemptions += 1
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0


def _chunk(sequence: Sequence, num_tokens: int) -> Chunk:
    return Chunk(sequence, sequence.num_computed, num_tokens, samples=num_tokens == sequence.num_pending)
