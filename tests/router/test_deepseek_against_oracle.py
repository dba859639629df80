"""The model against the naive oracle, in every combination that transformers ignores."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import Oracle
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import YARN, write_checkpoint

VOCAB_SIZE = 256

YARN_VARIANTS: dict[str, dict[str, Any]] = {
    "mscale alone": {"mscale": 0.5},
    "mscale_all_dim alone": {"mscale_all_dim": 0.8},
    "mscale below mscale_all_dim": {"mscale": 0.4, "mscale_all_dim": 1.2},
    "neither": {},
    "mscale_all_dim of zero": {"mscale": 0.5, "mscale_all_dim": 0},
    "short original length": {"mscale": 1, "mscale_all_dim": 1, "original_max_position_embeddings": 32},
    "wide ramp": {"beta_fast": 64, "beta_slow": 0.001},
}


def check(directory: Path, family: str, **overrides: Any) -> None:
    """Compare prompts, and generated tokens, which take the other path through attention."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "torch_dtype": "float32"}
    write_checkpoint(directory, family, **sizes, **overrides)
    driver, oracle = Driver(directory), Oracle(directory)
    prompts = random_prompts((1, 24), VOCAB_SIZE)
    sequences = [driver.sequence([*prompt, 3, 1, 4], num_prompt_tokens=len(prompt)) for prompt in prompts]
    for sequence, logits in zip(sequences, driver.finish(*sequences), strict=True):
        expected = oracle.logits(sequence.tokens)[-1].float()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "scoring_func", "topk_method", "norm_topk_prob"),
    list(
        itertools.product(
            ("v2", "v3"),
            ("softmax", "sigmoid"),
            ("greedy", "group_limited_greedy", "noaux_tc"),
            (False, True),
        )
    ),
)
def test_every_gate_equals_the_oracle(
    tmp_path: Path, family: str, scoring_func: str, topk_method: str, norm_topk_prob: bool
) -> None:
    check(
        tmp_path,
        family,
        scoring_func=scoring_func,
        topk_method=topk_method,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.7,
        n_group=4,
        topk_group=2,
    )


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize(
    ("first_k_dense_replace", "moe_layer_freq"), [(0, 1), (0, 2), (1, 2), (2, 3), (3, 1)]
)
def test_dense_and_expert_layers_alternate_as_the_oracle_says(
    tmp_path: Path, family: str, first_k_dense_replace: int, moe_layer_freq: int
) -> None:
    check(tmp_path, family, first_k_dense_replace=first_k_dense_replace, moe_layer_freq=moe_layer_freq)


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("variant", YARN_VARIANTS)
def test_every_yarn_equals_the_oracle(tmp_path: Path, family: str, variant: str) -> None:
    without = {key: value for key, value in YARN.items() if key not in {"mscale", "mscale_all_dim"}}
    check(tmp_path, family, rope_scaling=without | YARN_VARIANTS[variant])


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_tied_embeddings_biases_and_no_shared_experts_equal_the_oracle(tmp_path: Path, family: str) -> None:
    check(
        tmp_path, family, tie_word_embeddings=True, attention_bias=True, n_shared_experts=None, q_lora_rank=32
    )


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_one_expert_per_token_and_one_expert_per_group_equal_the_oracle(tmp_path: Path, family: str) -> None:
    check(tmp_path / "one", family, num_experts_per_tok=1, routed_scaling_factor=1.7)
    check(tmp_path / "sole", family, topk_method="noaux_tc", n_group=16, topk_group=5)


def test_negative_corrections_never_let_in_an_expert_of_another_group(tmp_path: Path) -> None:
    # With scores far below their corrections, masking with 0 would choose from the groups that were left out.
    check(tmp_path, "v3", seed=5, scoring_func="softmax", n_group=8, topk_group=2, num_experts_per_tok=4)
