"""The engine's steps with a stand-in for the model that reads the paged cache: tokens, losses and epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import WorkerLost
from common.exchange import Dispatched, Extra, RouterExchange, RowOrigins, StepHeader
from common.model_config import ModelConfig
from router.batch import Batch
from router.engine import Engine, Membership
from router.expert_load import ExpertLoads
from router.messages import Lost, Rejected, Stats, Submit, Tokens
from router.model.latent_cache import LatentCache
from router.scheduler import Limits, Scheduler
from tests.router.engine_child import tune

VOCAB = 50
ROOMY = Limits(num_blocks=200, block_size=4, max_batch_size=16, max_prefill_tokens=64, max_seq_len=100)
POISON = 49
"""The stand-in gives NaN where the context holds this token."""


@dataclass
class ScriptedExchange:
    """A router's end without workers: records the steps, and loses a worker in the one it is told to."""

    lost_in_step: int | None = None
    headers: list[StepHeader] = field(default_factory=list)
    is_closed: bool = False
    extra: Extra = field(default_factory=Extra)

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        self.headers.append(header)

    def dispatch(
        self, layer_id: int, micro_batch: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Dispatched:
        return Dispatched(layer_id, micro_batch, len(hidden_states))

    def combine(self, dispatched: Dispatched) -> Tensor:
        if self.headers[-1].step_id == self.lost_in_step:
            raise WorkerLost(1, "w1", dispatched.layer_id, "combine", 640, 0.25, "connection reset")
        return torch.zeros(dispatched.num_tokens, 1)

    def close(self) -> None:
        self.is_closed = True


def stand_in(batches: Sequence[Batch], cache: LatentCache, exchange: RouterExchange) -> Tensor:
    """What a model computes, one micro-batch after the other."""
    return torch.cat([stand_in_for_one(batch, cache, exchange) for batch in batches])


def stand_in_for_one(batch: Batch, cache: LatentCache, exchange: RouterExchange) -> Tensor:
    """Logits [B, V] as a function of all tokens up to a row, read back from the paged cache."""
    slots = cache.layer(0).reshape(-1, 2)
    slots[batch.slot_mapping, 0] = batch.input_ids.float()
    none = torch.zeros(len(batch.input_ids), 1)
    exchange.combine(exchange.dispatch(0, 0, none, none.long(), none))
    block_size = cache.block_size
    contexts: dict[int, list[float]] = {}
    for span in batch.prefills:
        rows = cache.layer(0)[span.block_table, :, 0].reshape(-1)
        for i in range(span.num_tokens):
            contexts[span.first_row + i] = rows[: span.start + i + 1].tolist()
    tables = zip(batch.decode_rows.tolist(), batch.block_tables, batch.context_lens.tolist(), strict=True)
    for row, table, length in tables:
        contexts[row] = cache.layer(0)[table[: -(-length // block_size)], :, 0].reshape(-1)[:length].tolist()
    return torch.stack(
        [_logits(contexts[row]) for row in batch.logits_rows.tolist()] or [torch.zeros(VOCAB)]
    )[: len(batch.logits_rows)]


def _logits(context: Sequence[float]) -> Tensor:
    if POISON in context:
        return torch.full((VOCAB,), math.nan)
    digest = 7
    for token in context:
        digest = (digest * 31 + int(token) + 1) % 9973
    logits = torch.sin(torch.arange(VOCAB) * (digest + 1.0)) * 3
    logits[POISON] = -math.inf
    return logits


class Bench:
    """An engine, and what it said."""

    def __init__(self, limits: Limits = ROOMY, micro_batches: int = 1) -> None:
        config = ModelConfig.model_construct(num_hidden_layers=1, kv_lora_rank=1, qk_rope_head_dim=1)
        self.sent: list[Any] = []
        self.floors: list[float] = []
        self.scheduler = Scheduler(limits)
        self.engine = Engine(
            stand_in,
            LatentCache(config, limits.num_blocks, limits.block_size, torch.float32, "cpu"),
            self.scheduler,
            vocab_size=VOCAB,
            device=torch.device("cpu"),
            term=9,
            num_experts_per_tok=1,
            tune=tune(2, micro_batches),
            loads=ExpertLoads(1, [0]),
            send=self.sent.append,
        )

    def adopt(self, epoch: int = 1, lost_in_step: int | None = None) -> ScriptedExchange:
        exchange = ScriptedExchange(lost_in_step)
        membership = Membership(epoch, exchange, 2, lambda: [[0.0, 0.0, 0.0]], self.floors.append)
        self.engine.adopt(membership)
        return exchange

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Step until nothing is left, and give the events by request."""
        while self.engine.has_work:
            self.engine.step()
        return self.events()

    def events(self) -> dict[str, list[dict[str, Any]]]:
        by_request: dict[str, list[dict[str, Any]]] = {}
        for message in self.said(Tokens):
            for event in message.events:
                by_request.setdefault(event["id"], []).append(event)
        return by_request

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


def request(request_id: str, num_prompt_tokens: int = 5, **overrides: Any) -> Submit:
    prompt = [(i * i + 3 * num_prompt_tokens) % (VOCAB - 1) for i in range(num_prompt_tokens)]
    fields: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 1,
        "max_tokens": 12,
        "stop_token_ids": [],
        "logprobs": 1,
    }
    return Submit(request_id=request_id, **{"prompt": prompt} | fields | overrides)


requests = st.lists(
    st.builds(
        request,
        request_id=st.uuids().map(str),
        num_prompt_tokens=st.integers(1, 30),
        max_tokens=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(-3, 3),
        stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
        logprobs=st.sampled_from([None, 0, 2]),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda submit: submit.request_id,
)


@settings(max_examples=60, deadline=None)
@given(
    submits=requests,
    block_size=st.sampled_from([1, 4, 7]),
    spare=st.integers(0, 12),
    max_batch_size=st.integers(1, 6),
    max_prefill_tokens=st.integers(1, 40),
)
def test_every_event_is_the_same_alone_in_a_batch_and_with_a_cache_that_is_too_small(
    submits: list[Submit], block_size: int, spare: int, max_batch_size: int, max_prefill_tokens: int
) -> None:
    expected: dict[str, list[dict[str, Any]]] = {}
    for submit in submits:
        alone = Bench()
        alone.adopt()
        alone.engine.submit(submit)
        expected |= alone.run()
    num_blocks = -(-100 // block_size) + spare
    tight = Bench(Limits(num_blocks, block_size, max_batch_size, max_prefill_tokens, max_seq_len=100))
    tight.adopt()
    for submit in submits:
        tight.engine.submit(submit)
        tight.engine.step()
    assert tight.run() == expected
    assert tight.scheduler.num_blocks_used == 0


def test_a_preempted_answer_is_replayed_and_no_token_is_told_twice() -> None:
    bench = Bench(
        Limits(num_blocks=12, block_size=4, max_batch_size=4, max_prefill_tokens=64, max_seq_len=48)
    )
    bench.adopt()
    for name in "abc":
        bench.engine.submit(request(name, 9, max_tokens=30))
    events = bench.run()
    assert bench.scheduler.num_preemptions > 0
    tokens = [[event["token"] for event in events[name]] for name in "abc"]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0]) == 30


def header_of(epoch: int, step_id: int, num_tokens: int) -> StepHeader:
    """With one expert per token, two workers and a factor of 8 everything fits."""
    return StepHeader(9, epoch, step_id, 2, num_tokens, round_rows=num_tokens, pass_rows=num_tokens)


def test_step_headers_carry_term_epoch_growing_ids_and_the_number_of_tokens() -> None:
    bench = Bench()
    first = bench.adopt(epoch=4)
    bench.engine.submit(request("a", 70, max_tokens=2))
    bench.engine.step()
    second = bench.adopt(epoch=5)
    bench.run()
    assert first.headers == [header_of(4, 1, 64)]
    assert second.headers == [header_of(5, 2, 6), header_of(5, 3, 1)]
    assert first.is_closed
    assert not second.is_closed


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_a_step_that_is_cut_gives_the_same_answers_and_announces_its_largest_part(micro_batches: int) -> None:
    whole, cut = Bench(), Bench(micro_batches=micro_batches)
    exchange = cut.adopt()
    whole.adopt()
    for bench in (whole, cut):
        for index, num_prompt_tokens in enumerate((70, 3, 19)):
            bench.engine.submit(request(f"r{index}", num_prompt_tokens, max_tokens=5))
        bench.run()
    tokens = [[m for m in bench.sent if isinstance(m, Tokens)] for bench in (whole, cut)]
    assert tokens[0] == tokens[1]
    first = exchange.headers[0]
    assert (first.micro_batches, first.num_tokens) == (micro_batches, -(-64 // micro_batches))


def test_answers_go_on_unchanged_when_a_new_epoch_takes_over_between_two_steps() -> None:
    steady, moving = Bench(), Bench()
    for bench in (steady, moving):
        bench.adopt(epoch=1)
        bench.engine.submit(request("a", 20))
        bench.engine.step()
        bench.engine.step()
    moving.adopt(epoch=2)
    assert moving.run() == steady.run()


def test_a_disconnect_ends_its_own_epoch_only() -> None:
    bench = Bench()
    bench.adopt(epoch=3)
    bench.engine.submit(request("a"))
    bench.engine.disconnect(2, "late news")
    assert not bench.said(Lost)
    bench.engine.disconnect(3, "worker w0 left")
    assert bench.said(Lost) == [Lost(3, -1, "worker w0 left")]
    assert not bench.engine.has_work


def test_an_answer_the_model_cannot_give_is_rejected_and_the_others_go_on() -> None:
    bench = Bench()
    bench.adopt()
    bench.engine.submit(request("bad", prompt=[1, POISON, 2]))
    bench.engine.submit(request("good"))
    events = bench.run()
    (rejected,) = bench.said(Rejected)
    assert rejected.request_id == "bad"
    assert "position 3 are not finite" in rejected.message
    assert list(events) == ["good"]
    assert bench.scheduler.num_blocks_used == 0


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_rejected(token_id: int) -> None:
    bench = Bench()
    bench.adopt()
    bench.engine.submit(request("a", prompt=[0, token_id]))
    (rejected,) = bench.said(Rejected)
    assert f"token id {token_id} is not in the vocabulary" in rejected.message


def test_an_idle_engine_reports_once() -> None:
    bench = Bench()
    bench.adopt(epoch=6)
    bench.engine.submit(request("a"))
    bench.run()
    bench.engine.report()
    bench.engine.report()
    assert bench.sent[-1] == Stats(0, 0, 0, 12, 6, workers=[[0.0, 0.0, 0.0]])
    assert bench.sent[-2] != bench.sent[-1]
