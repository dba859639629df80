"""What the serving benchmark counts and concludes, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machine_ceilings import Ceilings
from benchmarks.serving.contender import Contender
from benchmarks.serving.standings import Standings, Turn, keep, kept
from benchmarks.serving.touched_weights import Part, TouchedWeights, q8_0_weights, stored_weights
from benchmarks.serving.workload import Workload
from tests.tiny_checkpoint import write_checkpoint

CEILINGS = Ceilings(read_gb_s=10.0, int8_gop_s=1000.0, bfloat16_gflop_s=100.0)
WORKLOAD = Workload(prefill_tokens=100, batches=(1,), repetitions=2)
WEIGHTS = TouchedWeights(
    always=Part(100e6, 100_000_000),
    lm_head=Part(50e6, 50_000_000),
    routed=Part(800e6, 800_000_000),
    num_experts=8,
    experts_per_token=2,
)


def contender(key: str, is_ours: bool) -> Contender:
    return Contender(key, key, is_ours, WEIGHTS, "int8", lambda _: {})


def turn(key: str, prefill: list[float], decode: list[float]) -> Turn:
    return Turn(key, CEILINGS, {"prefill 100": prefill, "decode, batch 1": decode})


def test_a_token_reads_its_own_experts_and_everything_that_is_not_routed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2", num_hidden_layers=3, vocab_size=1000)
    hidden, rank, heads, nope, rope, value = 64, 32, 4, 16, 16, 16
    attention = hidden * heads * (nope + rope) + hidden * (rope + rank) + rank * heads * (nope + value)
    attention += heads * value * hidden
    dense, expert, gate = 3 * hidden * 128, 3 * hidden * 32, 16 * hidden
    matrices = 3 * attention + dense + 2 * (gate + 2 * expert) + 2 * 4 * expert + 1000 * hidden
    norms = 3 * (2 * hidden + rank) + hidden
    weights = stored_weights(tmp_path)
    assert weights.step_operations(1, 1) == 2 * (matrices + norms)
    assert weights.step_bytes(1) == pytest.approx(2 * (matrices + norms))
    assert q8_0_weights(tmp_path).step_bytes(1) == pytest.approx((matrices + norms) * 34 / 32)


def test_a_large_step_reads_every_expert_once_and_its_limit_is_arithmetic() -> None:
    assert WEIGHTS.step_bytes(1000) == pytest.approx(950e6)
    assert WEIGHTS.step_operations(1000, 1) == 2 * (300e6 * 1000 + 50e6)
    assert WEIGHTS.limit(1000, 1, CEILINGS, 1000.0) == pytest.approx(1000 / 0.6001)
    # One token: 350 MB at 10 GB/s.
    assert WEIGHTS.limit(1, 1, CEILINGS, 1000.0) == pytest.approx(1 / 0.035)


def test_ratios_are_those_of_medians_to_the_peer_that_is_best_at_each_work() -> None:
    contenders = [contender("two-workers", True), contender("loopback", True)]
    contenders += [contender("slow", False), contender("mixed", False), contender("not measured", False)]
    turns = [
        turn("two-workers", [300.0], [18.0]),
        turn("mixed", [100.0, 100.0], [4.0, 4.0]),
        turn("slow", [50.0], [9.0]),
        turn("loopback", [300.0], [24.0]),
        turn("two-workers", [900.0, 300.0], [18.0, 1.0]),
    ]
    standings = Standings(contenders, turns, WORKLOAD)
    assert list(standings.ratios_table())[2:] == [
        "| two-workers / best peer | 3.00 | 2.00 |",
        "| two-workers / loopback | 1.00 | 0.75 |",
        "| loopback / best peer | 3.00 | 2.67 |",
    ]
    assert (
        "| two-workers | decode, batch 1 | 350 | 0.7 | 28.6 | reading | 18.0 | 63% |"
        in standings.limits_table()
    )


def test_turns_come_back_from_the_file_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "turns.jsonl"
    assert kept(file) == []
    turns = [turn("a", [1.5], [2.0, 3.0]), turn("b", [4.0], [5.0])]
    for one in turns:
        keep(file, one)
    assert kept(file) == turns


def test_a_workload_arrives_in_another_process_as_it_was_and_no_two_prompts_are_alike() -> None:
    workload = Workload(batches=(1, 3), threads=5)
    assert Workload.from_json(workload.to_json()) == workload
    prompts = [*workload.short_prompts(32), *(workload.long_prompt(index) for index in range(4))]
    assert len({tuple(one) for one in prompts}) == 36
