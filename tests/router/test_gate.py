"""The gate: choice and weights of a token never depend on other tokens, and keep the rules of groups."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.model_config import ModelConfig
from router.kernels import load_kernels
from router.model.deepseek import Gate
from tests.tiny_checkpoint import COMMON, FAMILIES

GATES = list(
    itertools.product(
        ("v2", "v3"), ("softmax", "sigmoid"), ("greedy", "group_limited_greedy", "noaux_tc"), (False, True)
    )
)
NUM_EXPERTS = 160


@pytest.fixture(params=GATES, ids=lambda gate: "-".join(map(str, gate)))
def gate(request: pytest.FixtureRequest, tmp_path: Path) -> Gate:
    family, scoring_func, topk_method, norm_topk_prob = request.param
    overrides = {
        "scoring_func": scoring_func,
        "topk_method": topk_method,
        "norm_topk_prob": norm_topk_prob,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "hidden_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(COMMON | FAMILIES[family] | overrides))
    made = Gate(ModelConfig.from_directory(tmp_path), load_kernels("cpu"))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(made.weight, std=0.1, generator=generator)
    if made.e_score_correction_bias is not None:
        torch.nn.init.normal_(made.e_score_correction_bias, std=0.1, generator=generator)
    return made


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_a_token_gets_the_same_experts_and_weights_in_any_company(gate: Gate) -> None:
    rows = torch.randn(513, 128, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    ids, weights = gate(rows)
    for threads, count in itertools.product((1, 2, 3), (*range(1, 18), 31, 64, 127, 129, 400)):
        torch.set_num_threads(threads)
        first = 513 - count if count % 2 else 7
        some_ids, some_weights = gate(rows[first : first + count])
        assert torch.equal(some_ids, ids[first : first + count])
        assert torch.equal(some_weights, weights[first : first + count])


def test_experts_are_distinct_and_stay_within_the_kept_groups(gate: Gate) -> None:
    ids, weights = gate(torch.randn(200, 128, generator=torch.Generator().manual_seed(2)))
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert all(len(set(row)) == 6 for row in ids.tolist())
    groups = [{expert_id // (NUM_EXPERTS // 8) for expert_id in row} for row in ids.tolist()]
    if gate.config.topk_method != "greedy":
        assert max(map(len, groups)) <= 3
    else:
        assert max(map(len, groups)) > 3


def test_normalized_weights_sum_to_what_the_family_says(gate: Gate) -> None:
    _, weights = gate(torch.randn(50, 128, generator=torch.Generator().manual_seed(3)))
    if gate.config.norm_topk_prob:
        factor = gate.config.routed_scaling_factor if gate.config.family == "v3" else 1.0
        torch.testing.assert_close(weights.sum(-1), torch.full((50,), factor))


def test_a_step_without_tokens_chooses_nothing(gate: Gate) -> None:
    ids, weights = gate(torch.empty(0, 128))
    assert ids.shape == weights.shape == (0, 6)
