"""The same tokens and the same bits, whatever the level, the number of workers and the batch."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.quantize import main as quantize_main
from expertmesh.trace_summary import summarize
from tests.e2e.conftest import NUM_EXPERTS
from tests.e2e.fleet import Answer, Fleet, command, fleet_of, generate
from tests.tiny_checkpoint import write_checkpoint

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


VARIANTS: dict[str, tuple[int, dict[str, str]]] = {
    "collective, AllGather": (1, {"EXPERTMESH_EXCHANGE": "collective"}),
    "collective, AllToAll": (2, {"EXPERTMESH_EXCHANGE": "collective"}),
    "micro-batches": (2, {"EXPERTMESH_MICRO_BATCHES": "3", "EXPERTMESH_CHUNK_ROWS": "4"}),
    "replicas, AllGather": (1, {"EXPERTMESH_REDUNDANT_EXPERTS": "9"}),
    "replicas, AllToAll": (2, {"EXPERTMESH_REDUNDANT_EXPERTS": "9"}),
}


@pytest.mark.e2e
@pytest.mark.parametrize("variant", VARIANTS)
def test_how_rows_travel_and_who_serves_them_changes_no_bit(
    v3_model: Path, loopback_answers: list[tuple[object, ...]], variant: str
) -> None:
    ep_level, environment = VARIANTS[variant]
    flags = ("--expert-workers", "3", "--ep-level", str(ep_level))
    with fleet_of(v3_model, *flags, **environment) as fleet:
        assert answers(fleet) == loopback_answers


@pytest.mark.e2e
def test_a_v2_checkpoint_answers_the_same_in_one_process_and_with_two_workers(v2_model: Path) -> None:
    with fleet_of(v2_model, "--expert-workers", "0") as fleet:
        expected = answers(fleet)
    with fleet_of(v2_model, "--expert-workers", "2", "--ep-level", "2") as fleet:
        assert answers(fleet) == expected


@pytest.mark.e2e
@pytest.mark.parametrize("is_quantised", [False, True], ids=["bfloat16", "W8A8"])
def test_bench_exchange_traces_a_real_step_in_which_router_and_workers_compute_at_the_same_time(
    tmp_path: Path, *, is_quantised: bool
) -> None:
    # 16 experts a token beside one that is shared: workers have eight times the router's work, so the first
    # micro-batch is still computed when the second comes, whichever process a busy machine holds up.
    wide, file = tmp_path / "wide", tmp_path / "trace.json"
    write_checkpoint(
        wide,
        family="v3",
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=16,
        topk_group=4,
        moe_intermediate_size=2048,
    )
    model = tmp_path / "w8a8" if is_quantised else wide
    if is_quantised:
        assert quantize_main([str(wide), str(model)]) == 0
    flags = ("--model", str(model), "--micro-batches", "2", "--prompt-tokens", "1000", "--chunk-rows", "32")
    done = subprocess.run(
        command("bench", "exchange", *flags, "--max-tokens", "4", "--trace", str(file), "--json"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == summarize(json.loads(file.read_text())).json()
    # 3 MoE layers; a prompt of 1000 in 2 micro-batches, then 3 steps of one token.
    assert summary["counts"]["shared_experts"] == 3 * (2 + 3)
    assert summary["counts"]["experts"] > summary["counts"]["dispatch"]  # chunks
    assert summary["overlap"] > 0
    assert summary["arrived_meanwhile"] > 0


QUANTISED: dict[str, tuple[int, dict[str, str]]] = {
    "AllGather": (1, {}),
    "AllToAll": (2, {}),
    "collective, AllToAll": (2, {"EXPERTMESH_EXCHANGE": "collective"}),
    "micro-batches": (2, {"EXPERTMESH_MICRO_BATCHES": "3", "EXPERTMESH_CHUNK_ROWS": "4"}),
}


@pytest.fixture(scope="module")
def w8a8_answers(w8a8_model: Path) -> list[tuple[object, ...]]:
    with fleet_of(w8a8_model, "--expert-workers", "0") as fleet:
        return answers(fleet)


@pytest.mark.e2e
@pytest.mark.parametrize("variant", QUANTISED)
def test_a_checkpoint_that_was_quantised_answers_the_same_in_one_process_and_with_three_workers(
    w8a8_model: Path, w8a8_answers: list[tuple[object, ...]], variant: str
) -> None:
    # At ep_level 1 the experts quantise the rows, at 2 the router does.
    ep_level, environment = QUANTISED[variant]
    flags = ("--expert-workers", "3", "--ep-level", str(ep_level))
    with fleet_of(w8a8_model, *flags, **environment) as fleet:
        assert answers(fleet) == w8a8_answers
