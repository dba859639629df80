"""Says how good a checkpoint is: perplexity of held-out text, right answers, the load of the experts.

Shapes: B rows of S tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from examples.train_demo_model.chat_format import BOS, EOS, EOS_ID, Segment, prompt
from examples.train_demo_model.corpus import LAST_KINDS, draw_batch, encode
from examples.train_demo_model.model import DemoModel
from examples.train_demo_model.story_grammar import draw_story
from examples.train_demo_model.tasks import TASKS, Question, held_out_questions

HELD_OUT_STORIES = 400
BALANCE_ROWS = 64
BATCH = 64


class Evaluation(NamedTuple):
    """What was measured; accuracies are shares of answers that are right to the last character."""

    story_perplexity: float
    accuracy: dict[str, float]
    num_questions: dict[str, int]
    imbalance: dict[int, float]


def load_published(directory: Path) -> DemoModel:
    """Load a published checkpoint into the training model, in float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = load_file(directory / "model.safetensors")
    model = DemoModel(config)
    state = {}
    for name in model.state_dict():
        if ".mlp.experts." in name:
            prefix, part = name.rsplit(".", 1)
            names = [f"{prefix}.{expert}.{part}.weight" for expert in range(config["n_routed_experts"])]
            state[name] = torch.stack([stored[one] for one in names]).float()
        else:
            state[name] = stored[name].float()
    model.load_state_dict(state)
    return model.eval()


def as_rows(documents: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Put documents below each other; return their ids and what of them is said, 2 x [B, S]."""
    length = max(len(ids) for ids, _ in documents)
    rows = torch.zeros(len(documents), length, dtype=torch.long)
    said = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, (ids, is_said) in enumerate(documents):
        rows[row, : len(ids)] = torch.tensor(ids)
        said[row, : len(ids)] = torch.tensor(is_said)
    return rows, said


@torch.no_grad()
def said_logits(
    model: DemoModel, documents: Sequence[tuple[list[int], list[bool]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for everything that is said: its row, its logits [said, V] and what is said [said]."""
    rows, said = as_rows(documents)
    wanted = said[:, 1:]
    logits = model(rows[:, :-1], torch.zeros_like(rows[:, :-1]), wanted)
    return wanted.nonzero()[:, 0], logits, rows[:, 1:][wanted]


def story_perplexity(model: DemoModel, tokenizer: Tokenizer) -> float:
    """Return the perplexity of a token of stories from a seed that training never uses."""
    draw = random.Random("held out stories")
    loss, count = 0.0, 0
    for _ in range(0, HELD_OUT_STORIES, BATCH):
        documents = [
            encode(tokenizer, [(BOS, False), (draw_story(draw).text + EOS, True)]) for _ in range(BATCH)
        ]
        _, logits, spoken = said_logits(model, documents)
        loss += float(F.cross_entropy(logits, spoken, reduction="sum"))
        count += len(spoken)
    return float(torch.tensor(loss / count).exp())


def right_answers(model: DemoModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[bool]:
    """Say of each question whether the greedy answer is the right one, and ends where it should.

    An answer is found greedily exactly if each of its tokens is the likeliest after those before it.
    """
    right: list[bool] = []
    for first in range(0, len(questions), BATCH):
        part = questions[first : first + BATCH]
        documents: list[list[Segment]] = [
            [(BOS + prompt(question.text), False), (question.answer + EOS, True)] for question in part
        ]
        row, logits, spoken = said_logits(model, [encode(tokenizer, document) for document in documents])
        misses = torch.zeros(len(part), dtype=torch.long)
        misses.index_add_(0, row, (logits.argmax(-1) != spoken).long())
        right += (misses == 0).tolist()
    return right


@torch.no_grad()
def expert_imbalance(model: DemoModel, tokenizer: Tokenizer) -> dict[int, float]:
    """Return per layer how many rows the busiest expert gets, as a multiple of the mean."""
    for gate in model.gates().values():
        gate.tokens_per_expert.zero_()
    batch = draw_batch(tokenizer, "held out load", BALANCE_ROWS, 256, LAST_KINDS)
    model(batch.input_ids, batch.document_ids, batch.learned)
    return {layer_id: gate.balance(0.0) for layer_id, gate in model.gates().items()}


def evaluate(directory: Path) -> Evaluation:
    """Measure the checkpoint in `directory`, computed in float32."""
    model = load_published(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    questions = list(held_out_questions())
    right = right_answers(model, tokenizer, questions)
    results: dict[str, list[bool]] = {task: [] for task in TASKS}
    for question, is_right in zip(questions, right, strict=True):
        results[question.task].append(is_right)
    return Evaluation(
        story_perplexity(model, tokenizer),
        {task: sum(found) / len(found) for task, found in results.items()},
        {task: len(found) for task, found in results.items()},
        expert_imbalance(model, tokenizer),
    )


@torch.no_grad()
def greedy_answer(directory: Path, text: str, max_tokens: int = 200) -> str:
    """Continue `text` with the likeliest tokens until the model ends its answer."""
    model = load_published(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(BOS + text, add_special_tokens=False).ids
    num_prompt = len(ids)
    while len(ids) < num_prompt + max_tokens:
        rows = torch.tensor([ids])
        wanted = torch.zeros_like(rows, dtype=torch.bool)
        wanted[0, -1] = True
        ids.append(int(model(rows, torch.zeros_like(rows), wanted)[0].argmax()))
        if ids[-1] == EOS_ID:
            break
    answer: str = tokenizer.decode(ids[num_prompt:], skip_special_tokens=True)
    return answer
