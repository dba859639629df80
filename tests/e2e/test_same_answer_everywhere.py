"""The same tokens and the same bits, whatever the level, the number of workers and the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.quantize import main as quantize_main
from tests.e2e.fleet import Answer, Fleet, fleet_of, generate

PROMPTS = (
    "The router sees every token;",
    "An expert worker keeps no state, so",
    "1 2 3 4 5 6 7 8 9",
    "x",
)
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "logprobs": 2}
SAMPLED = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "seed": 7,
    "max_tokens": 24,
    "ignore_eos": True,
    "logprobs": 0,
}


def fingerprint(answer: Answer) -> tuple[object, ...]:
    """Everything about an answer that must not depend on where it was computed."""
    return (answer.text, tuple(answer.token_ids), tuple(answer.logprobs), str(answer.top))


def answers(fleet: Fleet) -> list[tuple[object, ...]]:
    """All prompts alone, greedy and sampled, then all of them at once."""
    alone = [fingerprint(generate(fleet, prompt, **how)) for prompt in PROMPTS for how in (GREEDY, SAMPLED)]
    jobs = [(prompt, how) for prompt in PROMPTS for how in (GREEDY, SAMPLED)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: fingerprint(generate(fleet, job[0], **job[1])), jobs))
    assert together == alone
    return alone


@pytest.fixture(scope="module")
def loopback_answers(v3_model: Path) -> list[tuple[object, ...]]:
    with fleet_of(v3_model, "--expert-workers", "0") as fleet:
        return answers(fleet)


@pytest.mark.e2e
@pytest.mark.parametrize(("num_workers", "ep_level"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1), (4, 2)])
def test_answers_are_bitwise_those_of_one_process(
    v3_model: Path, loopback_answers: list[tuple[object, ...]], num_workers: int, ep_level: int
) -> None:
    with fleet_of(v3_model, "--expert-workers", str(num_workers), "--ep-level", str(ep_level)) as fleet:
        assert answers(fleet) == loopback_answers


@pytest.mark.e2e
def test_a_v2_checkpoint_answers_the_same_in_one_process_and_with_two_workers(v2_model: Path) -> None:
    with fleet_of(v2_model, "--expert-workers", "0") as fleet:
        expected = answers(fleet)
    with fleet_of(v2_model, "--expert-workers", "2", "--ep-level", "2") as fleet:
        assert answers(fleet) == expected


@pytest.mark.e2e
def test_a_checkpoint_that_was_quantised_answers_the_same_in_one_process_and_with_three_workers(
    v3_model: Path, tmp_path: Path
) -> None:
    assert quantize_main([str(v3_model), str(tmp_path / "w8a8")]) == 0
    with fleet_of(tmp_path / "w8a8", "--expert-workers", "0") as fleet:
        expected = answers(fleet)
    with fleet_of(tmp_path / "w8a8", "--expert-workers", "3", "--ep-level", "2") as fleet:
        assert answers(fleet) == expected
