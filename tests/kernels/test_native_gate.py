"""The native gate: the reference's experts and weights, in any company, and an order of equal scores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import native_gate, native_library
from common.model_config import ModelConfig
from router.kernels import cpu, gate
from tests.kernels.comparing import num_threads, randn
from tests.tiny_checkpoint import COMMON, FAMILIES

pytestmark = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason=str(native_library.why_unavailable())
)
RULES = list(
    itertools.product(
        ("v2", "v3"), ("softmax", "sigmoid"), ("greedy", "group_limited_greedy", "noaux_tc"), (False, True)
    )
)
SIZES = ((16, 4, 2, 4), (16, 16, 5, 1), (64, 1, 1, 6), (160, 8, 3, 6), (256, 8, 4, 8))
"""Experts, groups, kept groups, experts per token."""
NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0, 3e38)


def config_of(
    folder: Path, rules: tuple[str, str, str, bool], size: tuple[int, int, int, int]
) -> ModelConfig:
    family, scoring_func, topk_method, norm_topk_prob = rules
    num_experts, num_groups, num_kept, top_k = size
    overrides = {
        "scoring_func": scoring_func,
        "topk_method": topk_method,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 2.5,
        "n_routed_experts": num_experts,
        "n_group": num_groups,
        "topk_group": num_kept,
        "num_experts_per_tok": top_k,
    }
    (folder / "config.json").write_text(json.dumps(COMMON | FAMILIES[family] | overrides))
    return ModelConfig.from_directory(folder)


@pytest.fixture(params=SIZES, ids=lambda size: "-".join(map(str, size)))
def size(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    """How many experts, groups, kept groups, and experts per token."""
    found: tuple[int, int, int, int] = request.param
    return found


@pytest.fixture(params=RULES, ids=lambda rules: "-".join(map(str, rules)))
def config(request: pytest.FixtureRequest, size: tuple[int, int, int, int], tmp_path: Path) -> ModelConfig:
    """A model with one of the rules there are, and one of the sizes."""
    return config_of(tmp_path, request.param, size)


def bias_of(config: ModelConfig) -> Tensor | None:
    return 0.1 * randn(2, config.n_routed_experts) if config.topk_method == "noaux_tc" else None


def is_clear(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:  # [T, E] -> [T]
    """Tell the rows whose choice a nudge does not change: elsewhere the last bit of a score decides."""
    ids, _ = gate.choose_experts(logits, bias, config)
    clear = torch.ones(len(logits), dtype=torch.bool)
    for seed in range(10):
        nudged, _ = gate.choose_experts(logits + 1e-5 * randn(seed, *logits.shape), bias, config)
        clear &= (nudged == ids).all(dim=-1)
    return clear


@pytest.mark.parametrize("num_tokens", [0, 1, 17, 600])
def test_experts_and_weights_are_those_of_the_reference(config: ModelConfig, num_tokens: int) -> None:
    logits, bias = 2 * randn(1, num_tokens, config.n_routed_experts), bias_of(config)
    expected_ids, expected_weights = gate.choose_experts(logits, bias, config)
    ids, weights = native_gate.load().choose_experts(logits, bias, config)
    assert (ids.shape, ids.dtype) == (expected_ids.shape, torch.int64)
    assert (weights.shape, weights.dtype) == (expected_weights.shape, torch.float32)
    clear = is_clear(logits, bias, config)
    assert clear.sum() >= 0.9 * num_tokens
    assert torch.equal(ids[clear], expected_ids[clear])
    torch.testing.assert_close(weights[clear], expected_weights[clear], rtol=1e-6, atol=0)


def test_a_row_has_the_same_bits_alone_in_company_and_at_any_number_of_threads(config: ModelConfig) -> None:
    kernels, bias = native_gate.load(), bias_of(config)
    logits = randn(1, 3000, config.n_routed_experts)
    with num_threads(1):
        ids, weights = kernels.choose_experts(logits, bias, config)
        alone = [kernels.choose_experts(row[None], bias, config) for row in logits[::97]]
    assert torch.equal(torch.cat([own for own, _ in alone]), ids[::97])
    assert torch.equal(torch.cat([own for _, own in alone]), weights[::97])
    for threads, first in itertools.product((2, 3), (0, 1, 2500)):
        with num_threads(threads):
            some_ids, some_weights = kernels.choose_experts(logits[first:], bias, config)
        assert torch.equal(some_ids, ids[first:])
        assert torch.equal(some_weights, weights[first:])


def test_of_equal_scores_that_of_the_lower_index_comes_first(config: ModelConfig) -> None:
    logits = torch.tensor([0.0, -0.0]).repeat(1, config.n_routed_experts // 2)
    bias = None if config.topk_method != "noaux_tc" else torch.zeros(config.n_routed_experts)
    ids, _ = native_gate.load().choose_experts(logits, bias, config)
    assert ids.tolist() == [list(range(config.num_experts_per_tok))]


@pytest.mark.parametrize("rules", [rules for rules in RULES if rules[2] != "noaux_tc"], ids=str)
def test_equal_scores_among_others_are_taken_by_index(
    rules: tuple[str, str, str, bool], size: tuple[int, int, int, int], tmp_path: Path
) -> None:
    config = config_of(tmp_path, rules, size)
    logits = torch.randint(4, (50, config.n_routed_experts), generator=torch.Generator().manual_seed(1))
    ids, _ = native_gate.load().choose_experts(logits.float(), None, config)
    group_size = config.n_routed_experts // config.num_groups
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        groups = [row[first : first + group_size] for first in range(0, len(row), group_size)]
        kept = sorted(range(len(groups)), key=lambda group: -max(groups[group]))[: config.num_kept_groups]
        allowed = [expert for expert in range(len(row)) if expert // group_size in kept]
        assert chosen == sorted(allowed, key=lambda expert: -row[expert])[: config.num_experts_per_tok]


def test_rows_that_are_not_finite_get_distinct_experts_and_do_not_touch_others(config: ModelConfig) -> None:
    num_experts, kernels = config.n_routed_experts, native_gate.load()
    rows = randn(1, 40, num_experts)
    for row, number in enumerate(NUMBERS):
        rows[4 * row, :] = number
        rows[4 * row + 1, :-1] = number
        rows[4 * row + 2, 0] = number
    rows[20:30] = torch.tensor(NUMBERS)[randn(3, 10, num_experts).abs().mul(2).long() % 5]
    finite = bias_of(config)
    for bias in (None,) if finite is None else (finite, finite * float("inf"), finite * float("nan")):
        ids, weights = kernels.choose_experts(rows, bias, config)
        assert 0 <= int(ids.min()) <= int(ids.max()) < num_experts
        group_size = num_experts // config.num_groups
        for chosen in ids.tolist():
            assert len(set(chosen)) == config.num_experts_per_tok
            assert len({expert // group_size for expert in chosen}) <= config.num_kept_groups
        others = kernels.choose_experts(rows[30:], bias, config)
        assert torch.equal(ids[30:], others[0])
        assert torch.equal(weights[30:], others[1])


def test_an_expert_whose_score_is_nan_is_chosen_first_as_topk_does(tmp_path: Path) -> None:
    config = config_of(tmp_path, ("v3", "sigmoid", "noaux_tc", True), (64, 8, 2, 6))
    logits = randn(1, 3, 64)
    logits[0, 20] = logits[1, 40] = float("nan")
    logits[2, 40] = -float("nan")
    bias = 0.1 * randn(2, 64)
    ids, _ = native_gate.load().choose_experts(logits, bias, config)
    assert torch.equal(ids, gate.choose_experts(logits, bias, config)[0])
    assert ids[:, 0].tolist() == [20, 40, 40]


def test_logits_and_bias_may_be_views(tmp_path: Path) -> None:
    config = config_of(tmp_path, ("v3", "sigmoid", "noaux_tc", True), (64, 8, 3, 6))
    logits, bias = randn(1, 64, 9).T, randn(2, 64, 3)[:, 1]
    ids, weights = native_gate.load().choose_experts(logits, bias, config)
    other_ids, other_weights = native_gate.load().choose_experts(
        logits.contiguous(), bias.contiguous(), config
    )
    assert torch.equal(ids, other_ids)
    assert torch.equal(weights, other_weights)


def test_what_the_configuration_does_not_describe_is_refused_before_its_memory_is_read(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, ("v3", "sigmoid", "noaux_tc", True), (64, 8, 3, 6))
    choose = native_gate.load().choose_experts
    logits, bias = randn(1, 3, 64), randn(2, 64)
    for wrong_logits, wrong_bias in ((logits.double(), bias), (logits, bias.bfloat16())):
        with pytest.raises(ValueError, match="give float32 alone"):
            choose(wrong_logits, wrong_bias, config)
    for wrong_logits, wrong_bias in ((logits[:, :63], bias), (logits, bias[:63])):
        with pytest.raises(ValueError, match="64 experts cannot be chosen by"):
            choose(wrong_logits, wrong_bias, config)


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
def test_a_cpu_chooses_by_the_native_gate_where_it_was_built(
    is_native: bool, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native_gate, "installed", lambda: None)
    choose = native_gate.load().choose_experts if is_native else gate.choose_experts
    logits, bias = randn(1, 17, config.n_routed_experts), bias_of(config)
    expected_ids, expected_weights = choose(logits, bias, config)
    ids, weights = cpu.choose_experts(logits, bias, config)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)
