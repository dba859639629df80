"""Choices are counted one by one, whatever way the rows take."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch

from router.expert_load import CountedExchange, ExpertLoads
from router.messages import AskLoads, Loads
from tests.router.driver import Driver, random_prompts
from tests.router.engine_child import engine
from tests.router.test_engine_process import SMALL, mixed_requests
from tests.tiny_checkpoint import write_checkpoint


def test_every_choice_of_every_token_is_counted_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v3", vocab_size=128)
    driver = Driver(tmp_path, micro_batches=2)
    config = driver.config
    loads = ExpertLoads(config.n_routed_experts, config.moe_layer_ids)
    chosen: dict[int, list[int]] = {
        layer_id: [0] * config.n_routed_experts for layer_id in config.moe_layer_ids
    }
    naive = driver.exchange
    original = naive.dispatch

    def watched(layer_id: int, micro_batch: int, *given: torch.Tensor) -> object:
        for expert in given[1].flatten().tolist():
            chosen[layer_id][expert] += 1
        return original(layer_id, micro_batch, *given)

    naive.dispatch = watched  # type: ignore[method-assign,assignment]
    driver.exchange = CountedExchange(naive, loads)
    driver.finish(*(driver.sequence(prompt) for prompt in random_prompts((5, 17, 1), 128)))
    assert not any(any(counts) for counts in loads.layers().values())
    loads.settle()
    assert loads.layers() == chosen
    assert all(sum(counts) == 23 * config.num_experts_per_tok for counts in chosen.values())


def test_a_step_that_is_computed_again_is_counted_once() -> None:
    loads = ExpertLoads(3, [4, 6])
    loads.begin_step()
    loads.note(4, torch.tensor([[0, 1], [0, 2]]))  # then a worker is lost
    for topk_ids in ([[0, 1], [0, 2]], [[2, 1]]):
        loads.begin_step()
        loads.note(4, torch.tensor(topk_ids))
        loads.note(6, torch.tensor(topk_ids[:1]))
        loads.settle()
    assert loads.layers() == {4: [2, 2, 2], 6: [1, 2, 1]}


def test_counts_are_those_of_every_step_so_far_whenever_they_are_asked_for() -> None:
    loads, expected = ExpertLoads(64, [1, 2]), {1: [0] * 64, 2: [0] * 64}
    rng = random.Random(3)
    for step in range(400):  # more choices than are kept before they are counted, several times
        loads.begin_step()
        for layer_id, counts in expected.items():
            topk_ids = [
                rng.sample(range(64), 6) for _ in range(rng.choice([1, 1, 9, 700]) if step % 7 else 1)
            ]
            loads.note(layer_id, torch.tensor(topk_ids))
            for expert in itertools.chain(*topk_ids):
                counts[expert] += 1
        loads.settle()
        if step % 50 == 0:
            assert loads.layers() == expected
    assert loads.layers() == expected


def test_an_engine_tells_its_counts_and_they_grow_by_every_token_it_computed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", **SMALL)
    with engine(tmp_path) as (child, _):
        requests = mixed_requests()
        child.answer(requests)
        child.send(AskLoads(7))
        told = child.until(Loads)
    assert told.ask_id == 7
    # The last token of an answer is never computed.
    computed = sum(len(one.prompt) + one.max_tokens - 1 for one in requests)
    assert {layer_id: sum(counts) for layer_id, counts in told.layers} == dict.fromkeys(
        (1, 2, 3), 4 * computed
    )
