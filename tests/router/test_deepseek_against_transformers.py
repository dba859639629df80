"""The model against transformers, which loads the same directories: logits of prompts, 64 greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import YARN, write_checkpoint

VOCAB_SIZE = 512
UNEVEN_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-lite": ("v2", {}),
    "v2-plain-rope": ("v2", {"rope_scaling": None}),
    "v2-q-lora-groups": ("v2", {"q_lora_rank": 48, **GROUPS}),
    "v2-uneven-yarn-tied": ("v2", {"rope_scaling": UNEVEN_YARN, "tie_word_embeddings": True}),
    "v2-q-lora-bias": ("v2", {"q_lora_rank": 48, "attention_bias": True, "rope_scaling": None}),
    "v3": ("v3", {}),
    "v3-plain-rope-no-q-lora": ("v3", {"q_lora_rank": None, "rope_scaling": None}),
    "v3-uneven-yarn": ("v3", {"rope_scaling": UNEVEN_YARN, "routed_scaling_factor": 1.0}),
    "v3-not-normalized": ("v3", {"norm_topk_prob": False, "first_k_dense_replace": 0}),
    "v3-attention-factor": ("v3", {"rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False}}),
    "v3-silent-bias": ("v3", {"attention_bias": True, "scoring_func": None, "topk_method": None}),
}

CLASSES = {"v2": DeepseekV2ForCausalLM, "v3": DeepseekV3ForCausalLM}

LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 128, 129, 200, 255, 300)


class Pair:
    """The same directory, loaded by both."""

    def __init__(self, directory: Path, family: str) -> None:
        self.ours = Driver(directory)
        self.theirs = CLASSES[family].from_pretrained(directory, dtype=torch.float32).eval()

    def their_greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens: list[int] = []
        output = self.theirs(torch.tensor([prompt]), use_cache=True)
        for _ in range(num_tokens):
            tokens.append(int(output.logits[0, -1].argmax()))
            output = self.theirs(
                torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True
            )
        return tokens


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, overrides = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family, vocab_size=VOCAB_SIZE, torch_dtype="float32", **overrides)
    return Pair(directory, family)


@torch.no_grad()
def test_logits_of_prompts_of_mixed_lengths_in_one_batch_equal_transformers(pair: Pair) -> None:
    prompts = random_prompts(LENGTHS, VOCAB_SIZE)
    ours = pair.ours.finish(*(pair.ours.sequence(prompt) for prompt in prompts))
    for prompt, logits in zip(prompts, ours, strict=True):
        theirs = pair.theirs(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_of_a_prompt_in_chunks_equal_transformers(pair: Pair) -> None:
    prompts = random_prompts((300, 45), VOCAB_SIZE, seed=2)
    ours = pair.ours.finish(*(pair.ours.sequence(prompt) for prompt in prompts), chunk_size=37)
    for prompt, logits in zip(prompts, ours, strict=True):
        theirs = pair.theirs(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_64_greedy_tokens_of_a_mixed_batch_equal_transformers(pair: Pair) -> None:
    prompts = random_prompts((1, 20, 300), VOCAB_SIZE, seed=3)
    sequences = [pair.ours.sequence(prompt, room=64) for prompt in prompts]
    ours = pair.ours.greedy(sequences, 64)
    assert ours == [pair.their_greedy(prompt, 64) for prompt in prompts]


def test_a_directory_saved_by_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    for family, their_class in CLASSES.items():
        published, saved = tmp_path / family, tmp_path / f"{family}-saved"
        write_checkpoint(
            published, family, vocab_size=VOCAB_SIZE, torch_dtype="float32", rope_scaling=UNEVEN_YARN
        )
        their_class.from_pretrained(published, dtype=torch.float32).save_pretrained(saved)
        (prompt,) = random_prompts((40,), VOCAB_SIZE)
        first, second = Driver(published), Driver(saved)
        assert first.config == second.config
        assert torch.equal(first.finish(first.sequence(prompt)), second.finish(second.sequence(prompt)))
