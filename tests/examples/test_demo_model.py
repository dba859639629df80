"""The demo model: the product computes it as transformers does, and it is as good as its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from common.model_config import ModelConfig
from examples.train_demo_model.chat_format import prompt
from examples.train_demo_model.evaluation import load_published
from tests.examples.demo_served import BFLOAT16 as CHECKPOINT
from tests.examples.demo_served import MARGIN, MAX_TOKENS, TASKS, Served


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(CHECKPOINT, "float32")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHECKPOINT / "evaluation.json").read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def test_greedy_answers_equal_those_of_transformers(served: Served) -> None:
    theirs = DeepseekV3ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    texts = [
        prompt("What is expert parallelism?"),
        prompt("What is 27 + 45?"),
        prompt("Tell me a story about a brave fox named Finn."),
        "Once upon a time,",
        "Question: What is the capital of Norway? Answer:",
        "The opposite of hot",
    ]
    prompts = [served.tokenizer.encode(text) for text in texts]
    ours = served.greedy(prompts, MAX_TOKENS)
    for ids, answer in zip(prompts, ours, strict=True):
        generated = theirs.generate(
            torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=served.eos
        )
        assert generated[0, len(ids) :].tolist() == answer


@torch.no_grad()
def test_the_training_code_computes_the_logits_of_the_product(served: Served) -> None:
    ids = served.tokenizer.encode(
        "Once upon a time, there was a little fox named Lily. Lily lived on a hill."
    )
    (ours,) = served.driver.finish(served.driver.sequence(ids))
    rows = torch.tensor([ids])
    last = torch.arange(len(ids)) == len(ids) - 1
    (theirs,) = load_published(CHECKPOINT)(rows, torch.zeros_like(rows), last[None])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_answered_as_well_as_the_card_says(
    served: Served, measured: dict[str, Any], task: str
) -> None:
    assert served.accuracy(task) >= measured["accuracy"][task] - MARGIN


def test_the_demos_of_the_card_are_reproduced(served: Served, measured: dict[str, Any]) -> None:
    card = (CHECKPOINT / "MODEL_CARD.md").read_text(encoding="utf-8")
    demos = measured["demos"]
    answers = served.text([demo["prompt"] for demo in demos], 160)
    assert answers == [demo["answer"] for demo in demos]
    assert all(demo["prompt"] in card and demo["answer"].strip() in card for demo in demos)


def test_the_demonstration_gives_the_same_answer_in_bfloat16(measured: dict[str, Any]) -> None:
    demo = measured["demos"][0]
    assert Served(CHECKPOINT, "auto").text([demo["prompt"]], MAX_TOKENS) == [demo["answer"]]


def test_the_tokenizer_writes_a_conversation_as_the_chat_template_does(served: Served) -> None:
    question = "What does the gate do?"
    theirs = AutoTokenizer.from_pretrained(CHECKPOINT)
    written = theirs.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(written) == served.tokenizer.encode(prompt(question))


@pytest.mark.parametrize("text", ["12 + 7 = 19.", 'Déjà vu, "ça va"?\n\tΩ 🦊', "  two  spaces "])
def test_any_text_survives_the_tokenizer(served: Served, text: str) -> None:
    assert served.tokenizer.decode(served.tokenizer.encode(text)) == text


def test_the_checkpoint_is_small_and_has_the_experts_it_should_have() -> None:
    config = ModelConfig.from_directory(CHECKPOINT)
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (24, 4, 2)
    assert sum(file.stat().st_size for file in Path(CHECKPOINT).iterdir()) < 25_000_000
