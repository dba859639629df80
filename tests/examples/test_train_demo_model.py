"""How the demo model is trained: nothing kept back is shown, a run can go on, experts are balanced."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.train_demo_model.__main__ import given_optimizer, take_step
from examples.train_demo_model.chat_format import ASSISTANT, USER
from examples.train_demo_model.corpus import LAST_KINDS, draw_batch, draw_document, draw_texts, encode
from examples.train_demo_model.model import CONFIG, DemoModel, Gate
from examples.train_demo_model.tasks import held_out_questions
from examples.train_demo_model.training_state import load_state, save_state
from tests.source import ROOT

TINY = CONFIG | {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8, "q_lora_rank": 16}
NUM_STEPS = 4


def published_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "examples" / "demo_model" / "tokenizer.json"))


def tiny_model() -> DemoModel:
    torch.manual_seed(1)
    return DemoModel(TINY)


def test_training_shows_no_question_that_is_kept_back() -> None:
    kept = {question.text for question in held_out_questions()}
    text = "\n".join(draw_texts("kept back", 20_000, LAST_KINDS))
    shown = set(re.findall(f"(?:{USER}|Question: )([^\n]*?)(?:{ASSISTANT}| Answer:)", text))
    assert len(kept) > 1000
    assert len(shown) > 5000
    assert kept & shown == set()


@pytest.mark.parametrize(("task", "sign"), [("addition", "+"), ("subtraction", "-")])
def test_a_pair_of_numbers_is_kept_back_in_both_orders_and_wherever_it_may_stand(
    task: str, sign: str
) -> None:
    sums = re.compile(rf"(?<!\d)(\d+) {re.escape(sign)} (\d+)")

    def pairs(text: str) -> set[frozenset[str]]:
        return {frozenset(pair) for pair in sums.findall(text)}

    kept = pairs(" ".join(question.text for question in held_out_questions() if question.task == task))
    shown = pairs(" ".join(draw_texts("both orders", 20_000, LAST_KINDS)))
    assert len(kept) > 300
    assert len(shown) > 2500
    assert kept & shown == set()


def test_a_document_encoded_in_parts_has_the_ids_of_its_whole_text() -> None:
    tokenizer = published_tokenizer()
    for seed in range(200):
        document = draw_document(random.Random(seed), LAST_KINDS)
        ids, said = encode(tokenizer, document)
        assert ids == tokenizer.encode("".join(text for text, _ in document), add_special_tokens=False).ids
        assert len(said) == len(ids)


def test_a_token_sees_nothing_of_another_document() -> None:
    model, batch = tiny_model(), draw_batch(published_tokenizer(), "apart", 1, 256)
    is_first = batch.document_ids == batch.document_ids[0, 0]
    changed = torch.where(is_first, 7, batch.input_ids)
    before = model(batch.input_ids, batch.document_ids, ~is_first)
    after = model(changed, batch.document_ids, ~is_first)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    tokenizer = published_tokenizer()
    whole = tiny_model()
    optimizer = given_optimizer(whole)
    for step in range(NUM_STEPS):
        take_step(whole, optimizer, tokenizer, step, NUM_STEPS)
        if step == 1:
            save_state(tmp_path, whole, optimizer, {"step": step + 1})
    resumed = DemoModel(TINY)
    optimizer = given_optimizer(resumed)
    progress = load_state(tmp_path, resumed, optimizer)
    assert progress == {"step": 2}
    for step in range(2, NUM_STEPS):
        take_step(resumed, optimizer, tokenizer, step, NUM_STEPS)
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_balancing_evens_out_experts_that_the_gate_prefers() -> None:
    torch.manual_seed(2)
    gate = Gate(CONFIG)
    torch.nn.init.normal_(gate.weight, std=0.02)
    hidden_states = torch.randn(2000, CONFIG["hidden_size"]) + 3 * gate.weight[0].sign()
    imbalances = []
    for _ in range(400):
        gate(hidden_states)
        imbalances.append(gate.balance(1e-2))
    assert imbalances[0] > 3
    assert imbalances[-1] < 1.5
