"""Turns a plan into the tensors of one step: the only place where lists become tensors.

Shapes: T tokens, B sequences that sample, N tokens on the decode path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.plan import Chunk, Plan


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A run of prompt tokens of one sequence.

    Attributes:
        first_row: the row of the step where it begins.
        start: the position of the sequence where it begins.
        block_table: [blocks that hold positions 0 ... start + num_tokens - 1] int64.
    """

    first_row: int
    num_tokens: int
    start: int
    block_table: Tensor

    @property
    def end(self) -> int:
        """The position after the last token, and the number of keys the last token sees."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model reads in one micro-batch of a step. Rows stand in the order of the plan.

    A row whose position lies in the prompt of its sequence belongs to one of `prefills`, any other to
    `decode_rows`. Which path computes a token depends on nothing else, so a replay gives the same bits.

    Attributes:
        micro_batch: its number within the step.
        input_ids: [T] int64.
        positions: [T] int64, within the row's own sequence.
        request_keys: [T] int64, of the row's sequence.
        slot_mapping: [T] int64, block * block_size + offset: where the row's latents go in the cache.
        num_positions: one more than the highest position.
        prefills: runs of prompt tokens.
        decode_rows: [N] int64, rows that attend on the decode path.
        block_tables: [N, most blocks of any of them] int64, padded with block 0.
        context_lens: [N] int64 on the CPU, keys each of them sees, itself included: some devices want them as
            arguments, and asking for them in every layer would stop the device each time.
        logits_rows: [B] int64, rows whose logits give a token, in the order of the plan.
    """

    micro_batch: int
    input_ids: Tensor
    positions: Tensor
    request_keys: Tensor
    slot_mapping: Tensor
    num_positions: int
    prefills: tuple[PrefillSpan, ...]
    decode_rows: Tensor
    block_tables: Tensor
    context_lens: Tensor
    logits_rows: Tensor


def build_batch(plan: Plan, block_size: int, device: torch.device | str, micro_batch: int = 0) -> Batch:
    """Lay out the tokens of a plan, or of a part of one. `block_size` is the tokens of a KV block."""
    input_ids: list[int] = []
    positions: list[int] = []
    request_keys: list[int] = []
    slots: list[int] = []
    prefills: list[PrefillSpan] = []
    decode_rows: list[int] = []
    tables: list[list[int]] = []
    context_lens: list[int] = []
    logits_rows: list[int] = []
    for chunk in plan.chunks:
        first_row = len(input_ids)
        table = chunk.sequence.block_table
        input_ids += chunk.sequence.tokens[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        request_keys += [chunk.sequence.request_key] * chunk.num_tokens
        slots += _slots(chunk, block_size)
        num_prompt = max(0, min(chunk.end, chunk.sequence.num_prompt_tokens) - chunk.start)
        if num_prompt:
            num_blocks = _num_blocks(chunk.start + num_prompt, block_size)
            block_table = torch.tensor(table[:num_blocks], dtype=torch.int64, device=device)
            prefills.append(PrefillSpan(first_row, num_prompt, chunk.start, block_table))
        for position in range(chunk.start + num_prompt, chunk.end):
            decode_rows.append(first_row + position - chunk.start)
            tables.append(table[: _num_blocks(position + 1, block_size)])
            context_lens.append(position + 1)
        if chunk.samples:
            logits_rows.append(len(input_ids) - 1)

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(
        micro_batch=micro_batch,
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        request_keys=tensor(request_keys),
        slot_mapping=tensor(slots),
        num_positions=max(positions, default=-1) + 1,
        prefills=tuple(prefills),
        decode_rows=tensor(decode_rows),
        block_tables=tensor(_padded(tables)).reshape(len(tables), -1 if tables else 0),
        context_lens=torch.tensor(context_lens, dtype=torch.int64),
        logits_rows=tensor(logits_rows),
    )


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    table = chunk.sequence.block_table
    return [
        table[position // block_size] * block_size + position % block_size
        for position in range(chunk.start, chunk.end)
    ]


def _padded(tables: list[list[int]]) -> list[list[int]]:
    width = max(map(len, tables), default=0)
    return [table + [0] * (width - len(table)) for table in tables]
