"""The W8A8 demo model: what the quantizer makes of the other one, and as good as it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from common.quantize import main as quantize_main
from examples.train_demo_model.chat_format import prompt
from tests.examples.demo_served import (
    BFLOAT16,
    MARGIN,
    MAX_TOKENS,
    TASKS,
    W8A8,
    Served,
    held_out_stories,
    sample,
)
from tests.quantized_checkpoint import read_tensors, write_float

NUM_STORIES = 24


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(W8A8, "auto")


def test_the_quantizer_makes_it_of_the_bfloat16_one(tmp_path: Path) -> None:
    target = tmp_path / "w8a8"
    assert quantize_main([str(BFLOAT16), str(target)]) == 0
    made, committed = read_tensors(target), read_tensors(W8A8)
    assert made.keys() == committed.keys()
    for name, tensor in made.items():
        assert tensor.dtype == committed[name].dtype
        assert torch.equal(tensor, committed[name]), name
    names = {file.name for file in target.iterdir()}
    assert {file.name for file in W8A8.iterdir()} == names - {"evaluation.json"}
    for name in names - {"evaluation.json"}:
        if not name.endswith(".safetensors"):
            assert (W8A8 / name).read_bytes() == (target / name).read_bytes(), name


def test_perplexity_of_held_out_stories_is_within_one_percent_of_bfloat16(served: Served) -> None:
    stories = held_out_stories(NUM_STORIES)
    measured = json.loads((BFLOAT16 / "evaluation.json").read_text(encoding="utf-8"))
    expected = Served(BFLOAT16, "auto").perplexity(stories)
    # The same kind of text, and so near what the training code measured on more of it.
    assert expected == pytest.approx(measured["story_perplexity"], rel=0.05)
    assert served.perplexity(stories) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_answered_as_well_as_in_bfloat16(served: Served, task: str) -> None:
    measured = json.loads((BFLOAT16 / "evaluation.json").read_text(encoding="utf-8"))
    assert served.accuracy(task) >= measured["accuracy"][task] - MARGIN


def test_the_demonstration_gives_the_same_answer(served: Served) -> None:
    demo = json.loads((BFLOAT16 / "evaluation.json").read_text(encoding="utf-8"))["demos"][0]
    assert served.text([demo["prompt"]], MAX_TOKENS) == [demo["answer"]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_answers_are_those_of_transformers_wherever_its_margin_exceeds_the_error(
    dtype: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    served = Served(W8A8, dtype)
    write_float(W8A8, tmp_path / "float")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    texts = [prompt(question.text) for task in TASKS for question in sample(task)[:2]]
    prompts = [served.tokenizer.encode(text) for text in (*texts, "Once upon a time,")]
    answers = served.greedy(prompts, MAX_TOKENS)
    ours, expected, chosen = [], [], []
    for ids, answer in zip(prompts, answers, strict=True):
        told = [*ids, *answer[:-1]]  # what the last token of the answer was chosen after
        ours.append(served.logits(told)[len(ids) - 1 :])
        expected.append(theirs(torch.tensor([told])).logits[0, len(ids) - 1 :])
        chosen += answer
    found, reference = torch.cat(ours), torch.cat(expected)
    relative_error = float((found - reference).norm() / reference.norm())
    record_property("relative_error", relative_error)
    assert 1e-4 < relative_error < 4e-2  # measured: 2.8e-2 in float32, 2.1e-2 in bfloat16
    best = reference.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 2 * (found - reference).abs().max()
    assert is_clear.float().mean() > 0.8
    assert torch.equal(reference.argmax(1)[is_clear], torch.tensor(chosen)[is_clear])


def test_both_checkpoints_together_stay_small() -> None:
    sizes = [file.stat().st_size for directory in (BFLOAT16, W8A8) for file in directory.iterdir()]
    assert sum(sizes) < 40_000_000
