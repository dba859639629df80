"""The engine process and real links: epochs come, go and come again, and answers stay the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.exchange import Received
from common.exchange.link_choice import Meeting, join_router
from common.exchange.links import LinksExpertExchange
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.placement import Placement, contiguous
from expert_worker.in_process import open_experts
from expert_worker.step_loop import serve
from router.messages import (
    Abort,
    CommitTune,
    Connect,
    Disconnect,
    Linked,
    LinkFailed,
    Loaded,
    Lost,
    Stats,
    Tokens,
    Tuned,
)
from tests.router.engine_child import Answer, EngineChild, engine, note, tune
from tests.router.test_engine_process import SMALL, mixed_requests, request
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.distributed

TERM = 1
JOIN_TIMEOUT_S = 20.0


class Worker:
    """The expert end of one link, served by a thread of this process."""

    def __init__(self, checkpoint: Path, placement: Placement, ep_rank: int) -> None:
        self.config = ModelConfig.from_directory(checkpoint)
        self.ep_rank = ep_rank
        self.experts = placement.experts_of(ep_rank)
        self._compute = open_experts(checkpoint, "float32", "cpu", self.experts, lambda *_: None)
        self._exchange = LinksExpertExchange(lambda term, epoch, reason: None)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def join(self, epoch: int, loaded: Loaded) -> None:
        prefix = prefix_of(epoch, self.ep_rank)
        place = (loaded.store_host, loaded.store_port, prefix, JOIN_TIMEOUT_S, "127.0.0.1")
        link = join_router(Meeting(*place, same_host="auto"))
        shape = RowShape(self.config.hidden_size, self.config.num_experts_per_tok, torch.float32)
        self._exchange.add_router(TERM, epoch, 7, link, shape, self.experts)

    def drop_links(self) -> None:
        self._exchange.forget(TERM)

    def stop(self) -> None:
        self._is_stopped.set()
        self._exchange.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with torch.inference_mode():
            serve(self._exchange, self._outputs, self._is_stopped.is_set)

    def _outputs(self, received: Received) -> Tensor:
        return self._compute(
            received.layer_id,
            received.rows,
            received.row_scales,
            received.tokens_per_expert,
            received.is_grouped,
        )


class Workers:
    """All expert workers of a checkpoint, and the engine they serve."""

    def __init__(self, checkpoint: Path, child: EngineChild, loaded: Loaded, ep_size: int) -> None:
        config = ModelConfig.from_directory(checkpoint)
        self.placement = contiguous(config.n_routed_experts, ep_size, config.moe_layer_ids)
        self.members = [Worker(checkpoint, self.placement, ep_rank) for ep_rank in range(ep_size)]
        self._child = child
        self._loaded = loaded

    def connect(self, epoch: int, waits_for_commit: bool = False) -> None:
        """Send Connect and let the workers come."""
        members: list[dict[str, int | str]] = [
            {"ep_rank": i, "worker": f"w{i}", "incarnation": 7, "prefix": prefix_of(epoch, i)}
            for i in range(len(self.members))
        ]
        layers: list[list[int | list[int]]] = [
            [layer_id, *(list(owner) for owner in owners)]
            for layer_id, owners in self.placement.layers.items()
        ]
        self._child.send(Connect(epoch, members, layers, JOIN_TIMEOUT_S, waits_for_commit))
        joins = [threading.Thread(target=worker.join, args=(epoch, self._loaded)) for worker in self.members]
        for join in joins:
            join.start()
        for join in joins:
            join.join(JOIN_TIMEOUT_S)

    def stop(self) -> None:
        for worker in self.members:
            worker.stop()


def prefix_of(epoch: int, ep_rank: int) -> str:
    return f"epoch{epoch}-rank{ep_rank}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family="v3", **SMALL)
    return directory


@pytest.fixture(params=[1, 2], ids=["ep_level_1", "ep_level_2"])
def linked(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[EngineChild, Workers]]:
    overrides = {
        "experts_in_process": False,
        "ep_level": request.param,
        "term": TERM,
        "deadline_floor_s": 5.0,
    }
    with engine(checkpoint, **overrides) as (child, loaded):
        workers = Workers(checkpoint, child, loaded, ep_size=2)
        try:
            workers.connect(1)
            assert child.until(Linked).epoch == 1
            yield child, workers
        finally:
            workers.stop()


def test_answers_over_links_are_those_of_one_process_before_and_after_a_loss(
    checkpoint: Path, linked: tuple[EngineChild, Workers]
) -> None:
    child, workers = linked
    with engine(checkpoint) as (alone, _):
        expected = alone.answer(mixed_requests())
    assert child.answer(mixed_requests()) == expected
    assert len(child.idle().workers) == 2
    after = len(child.seen)

    child.send(*mixed_requests())
    child.until(Tokens)
    workers.members[1].drop_links()
    lost = child.until(Lost)
    assert (lost.epoch, lost.ep_rank) == (1, 1)

    workers.connect(2)
    assert child.until(Linked).epoch == 2
    stats = child.until(Stats, lambda stats: stats.epoch == 2)
    assert stats.replayed_steps == 1
    assert child.idle().kv_blocks_used == 0
    answers = {one.request_id: Answer() for one in mixed_requests()}
    for message in child.seen[after:]:
        for event in message.events if isinstance(message, Tokens) else ():
            note(answers[str(event["id"])], event)
    assert answers == expected


def test_an_answer_goes_on_unchanged_while_the_next_epoch_takes_over(
    linked: tuple[EngineChild, Workers],
) -> None:
    child, workers = linked
    expected = child.answer([request("a", 9, max_tokens=400)])["a"].tokens
    child.send(request("a", 9, max_tokens=400))
    child.until(Tokens)
    workers.connect(2)
    child.until(Linked)
    child.until(Tokens, lambda message: message.events[0]["fin"] == "length")
    told = [event for message in child.seen if isinstance(message, Tokens) for event in message.events]
    assert [event["token"] for event in told][-400:] == expected


def test_an_answer_goes_on_unchanged_while_epochs_are_held_given_up_and_committed_with_a_tune(
    linked: tuple[EngineChild, Workers],
) -> None:
    child, workers = linked
    expected = child.answer([request("a", 9, max_tokens=400)])["a"].tokens
    child.send(request("a", 9, max_tokens=400))
    child.until(Tokens)
    for epoch in range(2, 6):
        workers.connect(epoch, waits_for_commit=True)
        assert child.until(Linked).epoch == epoch
        if epoch % 2:
            child.send(Disconnect(epoch, "a worker refused"))
        else:
            child.send(tune(1 + epoch % 4 // 2, 2, tune_id=epoch, deadline_floor_s=5.0))
            assert child.until(Tuned).tune_id == epoch
            child.send(CommitTune(epoch, epoch))
        in_force = epoch - epoch % 2
        child.until(Stats, lambda stats: (stats.num_running, stats.epoch) == (1, in_force))  # noqa: B023
    child.until(Tokens, lambda message: message.events[0]["fin"] == "length")
    told = [event for message in child.seen if isinstance(message, Tokens) for event in message.events]
    assert [event["token"] for event in told][-400:] == expected
    assert not any(isinstance(message, Lost) for message in child.seen)


def test_after_a_disconnect_what_runs_and_what_comes_wait_for_the_next_epoch(
    linked: tuple[EngineChild, Workers],
) -> None:
    child, workers = linked
    child.send(request("a", 9, max_tokens=5000))
    child.until(Tokens)
    child.send(Disconnect(1, "worker w1 left"))
    assert child.until(Lost) == Lost(1, -1, "worker w1 left")
    child.send(request("b", 9))
    waiting = child.until(Stats, lambda stats: stats.num_waiting == 1)
    assert (waiting.num_running, waiting.epoch) == (1, 0)
    child.send(Abort("a"))
    assert child.until(Stats, lambda stats: stats.num_running == 0).kv_blocks_used == 0
    workers.connect(2)
    child.until(Tokens, lambda message: message.events[0]["fin"] == "length")


def test_an_epoch_that_is_given_up_while_it_is_joined_never_comes_into_force(
    linked: tuple[EngineChild, Workers],
) -> None:
    child, workers = linked
    members: list[dict[str, int | str]] = [
        {"ep_rank": 0, "worker": "w0", "incarnation": 7, "prefix": "nobody"},
        {"ep_rank": 1, "worker": "w1", "incarnation": 7, "prefix": "nobody either"},
    ]
    child.send(Connect(2, members, [], 3.0))
    workers.connect(3)
    assert child.until(Linked).epoch == 3
    assert child.until(LinkFailed).epoch == 2
    assert child.answer([request("a", 5)])["a"].finish_reason == "length"
