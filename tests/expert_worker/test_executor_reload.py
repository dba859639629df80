"""A real executor whose router reloads: it is asked, may refuse, and a hundred epochs leave nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from common import process_group
from common.host_memory import free_memory
from expert_worker.messages import Check, Checked, LinkClosed, Linked, Loaded, Refused
from tests.expert_worker.executor_child import TERM, ExecutorChild, executor, prepare
from tests.expert_worker.test_executor import ALONE, enter, join, rows_of, step
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.asyncio, pytest.mark.distributed]

TOO_MUCH = 1 << 60
SETTLE_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family="v3", vocab_size=256, torch_dtype="float32")
    return directory


async def check(child: ExecutorChild, buffer_bytes: int, ep_level: int) -> str:
    child.send(Check(7, TERM, buffer_bytes, ep_level))
    checked = await child.until(Checked)
    assert checked.check_id == 7
    return str(checked.refusal)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(SETTLE_S):
        while not claim():
            await asyncio.sleep(0.05)


async def test_what_an_executor_cannot_do_it_refuses_and_goes_on_with_what_it_serves(
    checkpoint: Path,
) -> None:
    given = rows_of(5)
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        router = await enter(child, checkpoint, store, 1)
        expected = step(router, 1, 1, given)
        for epoch, (needs, words) in enumerate(
            (
                ({"buffer_bytes": TOO_MUCH}, "the free memory of this machine for larger buffers is "),
                ({"ep_level": 3}, "ep_level is 3, but this worker knows 1 and 2 only"),
            ),
            2,
        ):
            child.send(prepare(checkpoint, ALONE, 0, store, epoch, **needs))
            refused = await child.until(Refused)
            assert refused.epoch == epoch
            assert words in refused.reason
            assert torch.equal(step(router, 1, epoch, given), expected)
        following = await enter(child, checkpoint, store, 4)
        assert torch.equal(step(following, 4, 4, given), expected)
        router.close()
        following.close()


async def test_a_router_that_lets_go_of_an_epoch_says_goodbye_whether_it_was_stepped_or_not(
    checkpoint: Path,
) -> None:
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        for epoch in (1, 2):
            router = await enter(child, checkpoint, store, epoch)
            if epoch == 2:
                step(router, 2, 1, rows_of(2))
            router.close()
            closed = await child.until(LinkClosed)
            assert (closed.epoch, closed.reason) == (epoch, "the router said goodbye")


async def test_an_executor_says_what_it_would_refuse_while_it_loads_waits_and_serves(
    checkpoint: Path,
) -> None:
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        assert await check(child, 0, 2) == ""
        child.send(prepare(checkpoint, ALONE, 0, store, 1))
        await child.until(Loaded)
        assert "1073741824.0 GiB of buffers" in await check(child, TOO_MUCH, 1)
        assert "ep_level is 3" in await check(child, 0, 3)
        # To be asked is not to be told: the epoch that is prepared is prepared still.
        router = await join(store, 1)
        assert (await child.until(Linked)).epoch == 1
        step(router, 1, 1, rows_of(2))
        assert "larger buffers" in await check(child, TOO_MUCH, 1)
        assert await check(child, 1, 2) == ""
        step(router, 1, 2, rows_of(2))
        router.close()


async def test_buffers_of_the_epoch_in_force_are_not_needed_a_second_time(checkpoint: Path) -> None:
    store = process_group.open_store("127.0.0.1")
    some, more = int(0.7 * free_memory()), int(1.3 * free_memory())
    async with executor() as child:
        child.send(prepare(checkpoint, ALONE, 0, store, 1, buffer_bytes=some))
        router = await join(store, 1)
        await child.until(Linked)
        assert "larger buffers" in await check(child, more, 1)
        step(router, 1, 1, rows_of(2))
        assert await check(child, more, 1) == ""
        assert "larger buffers" in await check(child, some + more, 1)
        router.close()


@pytest.mark.parametrize("transport", ["auto", "links"])
async def test_forty_epochs_in_a_row_leave_neither_descriptors_nor_threads_behind(
    checkpoint: Path, transport: str
) -> None:
    given = rows_of(3)
    store = process_group.open_store("127.0.0.1")
    async with executor() as child:
        process = psutil.Process(child.process.pid)
        router = await enter(child, checkpoint, store, 1, transport)
        expected, in_force = step(router, 1, 1, given), 1
        sizes = process.num_fds(), process.num_threads()
        for epoch in range(2, 42):
            following = await enter(child, checkpoint, store, epoch, transport)
            if epoch % 3 == 0:  # given up: the engine lets go of what nobody committed
                following.close()
                assert torch.equal(step(router, in_force, epoch, given), expected)
                continue
            assert torch.equal(step(following, epoch, epoch, given), expected)
            router.close()
            router, in_force = following, epoch
        await until(lambda: process.num_fds() <= sizes[0] + 2 and process.num_threads() <= sizes[1] + 2)
        assert torch.equal(step(router, in_force, 100, given), expected)
        router.close()
