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
from examples.train_demo_model.tasks import Question, held_out_questions
from router.tokenizer import Tokenizer
from tests.router.driver import Driver
from tests.source import ROOT

CHECKPOINT = ROOT / "examples" / "demo_model"
SAMPLE = 40
"""Questions per task at most."""
MARGIN = 0.1
"""A sample of 40 may be that much worse than all questions together."""
MAX_TOKENS = 48


class Served:
    """The checkpoint as the product loads it, with the product's tokenizer."""

    def __init__(self, dtype: str) -> None:
        self.driver = Driver(CHECKPOINT, dtype, num_blocks=4096)
        self.tokenizer = Tokenizer.from_directory(CHECKPOINT, self.driver.config.vocab_size)
        (self.eos,) = self.driver.config.eos_token_ids(CHECKPOINT)

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Answer all prompts together; each answer ends with the end-of-sequence token, if it comes."""
        sequences = [self.driver.sequence(ids, room=num_tokens) for ids in prompts]
        answers: list[list[int]] = []
        for tokens in self.driver.greedy(sequences, num_tokens):
            end = tokens.index(self.eos) + 1 if self.eos in tokens else len(tokens)
            answers.append(tokens[:end])
        return answers

    def text(self, prompts: list[str], num_tokens: int) -> list[str]:
        """Answer texts with texts."""
        ids = [self.tokenizer.encode(text) for text in prompts]
        return [self.tokenizer.decode(tokens) for tokens in self.greedy(ids, num_tokens)]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served("float32")


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHECKPOINT / "evaluation.json").read_text(encoding="utf-8"))
    return found


def sample(task: str) -> list[Question]:
    """Take questions of a task that are spread evenly over all of them."""
    questions = [question for question in held_out_questions() if question.task == task]
    stride = max(1, len(questions) // SAMPLE)
    return questions[::stride][:SAMPLE]


TASKS = sorted({question.task for question in held_out_questions()})


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
    questions = sample(task)
    answers = served.text([prompt(question.text) for question in questions], MAX_TOKENS)
    right = [answer == question.answer for answer, question in zip(answers, questions, strict=True)]
    assert sum(right) / len(right) >= measured["accuracy"][task] - MARGIN


def test_the_demos_of_the_card_are_reproduced(served: Served, measured: dict[str, Any]) -> None:
    card = (CHECKPOINT / "MODEL_CARD.md").read_text(encoding="utf-8")
    demos = measured["demos"]
    answers = served.text([demo["prompt"] for demo in demos], 160)
    assert answers == [demo["answer"] for demo in demos]
    assert all(demo["prompt"] in card and demo["answer"].strip() in card for demo in demos)


def test_the_demonstration_gives_the_same_answer_in_bfloat16(measured: dict[str, Any]) -> None:
    demo = measured["demos"][0]
    assert Served("auto").text([demo["prompt"]], MAX_TOKENS) == [demo["answer"]]


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
