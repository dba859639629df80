"""How a plan becomes rows: which path each token takes, where its latents go, whose logits are wanted."""

from __future__ import annotations

import pytest
import torch

from router.batch import build_batch
from router.plan import Chunk, Plan
from router.sequence import Sequence


def sequence(
    num_tokens: int, num_prompt_tokens: int, block_table: list[int], first_token: int = 100
) -> Sequence:
    tokens = list(range(first_token, first_token + num_tokens))
    return Sequence("s", tokens, num_prompt_tokens, max_tokens=1, block_table=block_table)


def test_prompt_tokens_go_to_prefill_and_generated_ones_to_decode_rows() -> None:
    fresh = sequence(5, 5, [7, 2])
    decoding = sequence(9, 6, [1, 3, 0], first_token=200)
    replayed = sequence(6, 4, [5, 9], first_token=300)
    batch = build_batch(
        Plan((Chunk(fresh, 0, 3, False), Chunk(decoding, 8, 1, True), Chunk(replayed, 2, 4, True))), 4, "cpu"
    )
    assert batch.input_ids.tolist() == [100, 101, 102, 208, 302, 303, 304, 305]
    assert batch.positions.tolist() == [0, 1, 2, 8, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [28, 29, 30, 0, 22, 23, 36, 37]
    assert batch.num_positions == 9
    spans = [(span.first_row, span.num_tokens, span.start, span.end) for span in batch.prefills]
    assert spans == [(0, 3, 0, 3), (4, 2, 2, 4)]
    assert [span.block_table.tolist() for span in batch.prefills] == [[7], [5]]
    assert batch.decode_rows.tolist() == [3, 6, 7]
    assert batch.block_tables.tolist() == [[1, 3, 0], [5, 9, 0], [5, 9, 0]]
    assert batch.context_lens.tolist() == [9, 5, 6]
    assert batch.logits_rows.tolist() == [3, 7]


def test_a_step_without_decoding_has_empty_tensors() -> None:
    batch = build_batch(Plan((Chunk(sequence(4, 4, [3]), 0, 4, True),)), 4, "cpu")
    assert batch.decode_rows.shape == (0,)
    assert batch.block_tables.shape == (0, 0)
    assert batch.context_lens.shape == (0,)


def test_blocks_reserved_for_later_tokens_are_left_out() -> None:
    batch = build_batch(Plan((Chunk(sequence(5, 4, [3, 4, 5, 6]), 4, 1, True),)), 4, "cpu")
    assert batch.block_tables.tolist() == [[3, 4]]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 40])
def test_a_plan_that_is_cut_computes_the_same_tokens_in_the_same_order(num_parts: int) -> None:
    plan = Plan(
        (
            Chunk(sequence(9, 9, [1, 2, 3]), 2, 7, True),
            Chunk(sequence(4, 3, [4]), 3, 1, True),
            Chunk(sequence(12, 12, [5, 6, 7]), 0, 6, False),
        )
    )
    parts = plan.split(num_parts)
    assert len(parts) == min(num_parts, plan.num_tokens)
    lengths = [part.num_tokens for part in parts]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    batches = [build_batch(part, 4, "cpu", number) for number, part in enumerate(parts)]
    assert [batch.micro_batch for batch in batches] == list(range(len(parts)))
    whole = build_batch(plan, 4, "cpu")
    for name in ("input_ids", "positions", "slot_mapping"):
        cut = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(cut, getattr(whole, name))
    assert [one for part in parts for one in part.sampled] == list(plan.sampled)
