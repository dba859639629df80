"""A real executor: it loads, joins, computes, changes epochs under a router, and ends with its agent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from common import process_group
from common.channel import Shutdown
from common.exchange import StepHeader
from common.exchange.link_choice import Meeting, join_worker
from common.exchange.links import LinksRouterExchange
from common.exchange.loopback import LoopbackExchange
from common.exchange.routing import RowShape
from common.placement import Placement, contiguous
from common.process_group import StoreServer
from expert_worker.in_process import open_experts
from expert_worker.messages import Forget, LinkClosed, Linked, Loaded, PrepareFailed
from tests.expert_worker.executor_child import (
    INCARNATION,
    JOIN_TIMEOUT_S,
    TERM,
    ExecutorChild,
    executor,
    prefix_of,
    prepare,
)
from tests.quantized_checkpoint import write_w8a8
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.distributed]

NUM_EXPERTS, TOP_K, HIDDEN_SIZE, LAYER = 16, 4, 64, 1
SHAPE = RowShape(HIDDEN_SIZE, TOP_K, torch.float32)
ALONE = contiguous(NUM_EXPERTS, 1, [1, 2, 3])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family="v3", vocab_size=256, torch_dtype="float32")
    return directory


async def join(
    store: StoreServer, epoch: int, placement: Placement = ALONE, same_host: str = "auto"
) -> LinksRouterExchange:
    links = [
        await asyncio.to_thread(
            join_worker,
            Meeting(
                store.host, store.port, prefix_of(epoch, ep_rank), JOIN_TIMEOUT_S, "127.0.0.1", same_host
            ),
        )
        for ep_rank in range(placement.ep_size)
    ]
    names = [f"w{ep_rank}" for ep_rank in range(len(links))]
    incarnations = [INCARNATION] * len(links)
    return LinksRouterExchange(links, names, placement, SHAPE, TERM, incarnations, 5.0, None)


def rows_of(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = torch.rand(num_tokens, NUM_EXPERTS).topk(TOP_K, dim=1)
    return torch.randn(num_tokens, HIDDEN_SIZE), ids, weights


def step(
    exchange: LinksRouterExchange | LoopbackExchange, epoch: int, step_id: int, given: tuple[Tensor, ...]
) -> Tensor:
    exchange.begin(StepHeader(TERM, epoch, step_id, 1 + step_id % 2, given[0].shape[0]))
    return exchange.combine(exchange.dispatch(LAYER, 0, *given))


def in_process(checkpoint: Path, given: tuple[Tensor, ...]) -> Tensor:
    experts = ALONE.experts_of(0)
    compute = open_experts(checkpoint, "float32", "cpu", experts, lambda *_: None)
    return step(LoopbackExchange(compute, experts), 1, 0, given)


async def enter(
    child: ExecutorChild, checkpoint: Path, store: StoreServer, epoch: int, same_host: str = "auto"
) -> LinksRouterExchange:
    child.send(prepare(checkpoint, ALONE, 0, store, epoch))
    router = await join(store, epoch, same_host=same_host)
    await child.until(Linked)
    return router


async def test_an_executor_gives_the_bits_of_one_process_before_and_after_a_change_of_epoch(
    checkpoint: Path,
) -> None:
    given = rows_of(17)
    expected = in_process(checkpoint, given)
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        first = await enter(child, checkpoint, store, 1)
        before = child.progress.count
        assert torch.equal(step(first, 1, 1, given), expected)
        assert child.progress.count > before
        second = await enter(child, checkpoint, store, 2)
        # The older epoch is in force until the first step header of the next.
        assert torch.equal(step(first, 1, 2, given), expected)
        assert torch.equal(step(second, 2, 3, given), expected)
        first.close()
        second.close()
        await child.until(LinkClosed)


async def test_a_prepare_that_fails_leaves_the_epoch_in_force_alone(checkpoint: Path, tmp_path: Path) -> None:
    given = rows_of(3)
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        router = await enter(child, checkpoint, store, 1)
        expected = step(router, 1, 1, given)
        child.send(prepare(tmp_path / "nowhere", ALONE, 0, store, 2))
        failed = await child.until(PrepareFailed)
        assert (failed.epoch, failed.kind) == (2, "CheckpointError")
        assert "nowhere" in failed.message
        child.send(prepare(checkpoint, ALONE, 0, store, 3, timeout_s=0.3))
        failed = await child.until(PrepareFailed)
        assert (failed.epoch, failed.kind) == (3, "LinkError")
        assert torch.equal(step(router, 1, 2, given), expected)
        router.close()


async def test_rows_in_another_form_than_the_checkpoint_of_the_worker_takes_are_refused_before_it_loads(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_w8a8(checkpoint, tmp_path / "w8a8")
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        for epoch, (directory, int8_layers) in enumerate(
            [(checkpoint, [1, 2, 3]), (tmp_path / "w8a8", [])], 1
        ):
            child.send(prepare(directory, ALONE, 0, store, epoch, int8_layers=int8_layers))
            failed = await child.until(PrepareFailed)
            assert (failed.epoch, failed.kind) == (epoch, "CheckpointError")
            ours = [] if int8_layers else [1, 2, 3]
            assert failed.message == (
                f"the router sends rows of layers {int8_layers} in int8, but in {directory} the layers of "
                f"W8A8_DYNAMIC experts are {ours}: give router and workers the same checkpoint"
            )


async def test_a_later_epoch_supersedes_one_that_still_waits_for_its_router(checkpoint: Path) -> None:
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        child.send(prepare(checkpoint, ALONE, 0, store, 1))
        await child.until(Loaded)
        router = await enter(child, checkpoint, store, 2)
        late = await join(store, 1)
        failed = await child.until(PrepareFailed)
        assert (failed.epoch, failed.kind) == (1, "Superseded")
        assert step(router, 2, 1, rows_of(2)).shape == (2, HIDDEN_SIZE)
        late.close()
        router.close()


async def test_a_router_that_is_forgotten_loses_its_link_and_the_weights_stay(checkpoint: Path) -> None:
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        child.send(prepare(checkpoint, ALONE, 0, store, 1))
        router = await join(store, 1)
        loaded = (await child.until(Loaded)).loaded_bytes
        child.send(Forget(TERM))
        again = prepare(checkpoint, ALONE, 0, store, 5, term=TERM + 1)
        child.send(again)
        assert (await child.until(Loaded)).loaded_bytes == loaded
        router.close()


async def test_an_executor_ends_when_it_is_told_to_and_when_its_agent_is_gone() -> None:
    async with executor() as child:
        child.send(Shutdown())
        assert await asyncio.wait_for(child.process.wait(), 10) == 0
    async with executor() as child:
        child.process.channel.close()
        await asyncio.to_thread(psutil.Process(child.process.pid).wait, 10)
