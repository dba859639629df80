"""The two models of a step in micro-batches agree where both apply, and with what can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.pipeline import Stages, full_pipeline_s, turns_s


def test_one_micro_batch_waits_for_its_rows_in_every_layer() -> None:
    stages = Stages(attention_s=3.0, shared_s=1.0, experts_s=4.0, one_way_s=0.5)
    # 2 until the rows leave, then 5 until they are home, in which the shared experts fit.
    assert turns_s(stages, num_layers=10, micro_batches=1) == pytest.approx(70.0)
    slow_shared = Stages(attention_s=9.0, shared_s=7.0, experts_s=4.0, one_way_s=0.5)
    assert turns_s(slow_shared, num_layers=10, micro_batches=1) == pytest.approx(90.0)


@pytest.mark.parametrize("micro_batches", [3, 4])
@pytest.mark.parametrize(("attention_s", "experts_s"), [(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)])
def test_turns_take_as_long_as_the_formula_says_once_the_pipeline_is_full(
    attention_s: float, experts_s: float, micro_batches: int
) -> None:
    stages = Stages(attention_s, 0.0, experts_s, one_way_s=1.0)
    assert stages.micro_batches_needed <= micro_batches
    formula = full_pipeline_s(stages, 27, micro_batches)
    assert turns_s(stages, 27, micro_batches) == pytest.approx(formula)


def test_too_few_micro_batches_leave_gaps_that_the_formula_does_not_know() -> None:
    stages = Stages(attention_s=2.0, shared_s=0.0, experts_s=2.0, one_way_s=1.0)
    assert stages.micro_batches_needed == 3.0
    assert full_pipeline_s(stages, 10, 2) == 6 + 2 * 19
    # Six from one turn of a micro-batch to its next, ten times, and the second begins two later.
    assert turns_s(stages, 10, 2) == 62
