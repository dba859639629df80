"""The front's end of Tune: what is agreed to, by which start of the engine, and what a commit then does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import MARKS, Config, resolve
from common.errors import NotReady, ReloadRefused
from common.reload_class import HOT
from router.front.engine_tuning import EngineTuning, tune_of
from router.front.server import Front
from router.messages import CommitTune, Tune, Tuned, TuneRefused
from tests.router.front_fleet import front_config

OTHER: dict[str, Any] = {
    "model_name": "another",
    "ep_level": 2,
    "enable_init_routing_cutoff": True,
    "topk_scaling_factor": 0.5,
    "alltoall_ep_buffer_scale_factors": ((0, 1.0),),
    "max_input_token_len": 7,
    "truncation": 1,
    "max_prefill_tokens": 77,
    "max_batch_size": 7,
    "max_iter_times": 7,
    "micro_batches": 7,
    "chunk_rows": 7,
    "grouped_matmul": "off",
    "cutoff_min_rows": 7,
    "deadline_floor_s": 7.0,
    "drain_timeout_s": 7.0,
    "recovery_timeout_s": 8.0,
    "log_level": "error",
    "max_queued_requests": 7,
}
"""Another value for every hot field."""


class Bench:
    """A tuning, what it sent, and how often it had the engine started again."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.sent: list[Any] = []
        self.restarts = 0
        self.is_loaded = True
        self.tuning = EngineTuning(self.sent.append, self.restart, lambda: self.is_loaded, timeout_s)
        self.tuning.engine_started()
        self.old = resolve(None).config
        self.new = self.old.model_copy(update={"micro_batches": 3})

    def restart(self) -> None:
        self.restarts += 1

    async def ask(self) -> asyncio.Task[Any]:
        """Begin to propose; return when the engine was asked."""
        task = asyncio.create_task(self.tuning.propose(self.old, self.new))
        before = len(self.sent)
        while len(self.sent) == before:
            await asyncio.sleep(0)
        return task


def test_every_hot_field_that_a_new_engine_is_configured_with_reaches_the_running_one_too(
    tmp_path: Path,
) -> None:
    assert set(OTHER) == {field for field, mark in MARKS.items() if mark.reload is HOT}
    front = Front(front_config(tmp_path, 0))

    def as_configured(config: Config) -> object:
        front.in_force.effective = replace(effective, config=config)
        return front._configure()

    effective = front.in_force.effective
    old, before = effective.config, as_configured(effective.config)
    for field, value in OTHER.items():
        new = old.model_copy(update={field: value})
        assert (as_configured(new) != before) == (tune_of(new, 0) != tune_of(old, 0)), field


@pytest.mark.asyncio
async def test_what_makes_no_difference_to_the_engine_is_not_asked() -> None:
    bench = Bench()
    bench.is_loaded = False
    new = bench.old.model_copy(update={"max_queued_requests": 3})
    assert await bench.tuning.propose(bench.old, new) is None
    assert (bench.sent, bench.restarts) == ([], 0)


@pytest.mark.asyncio
async def test_what_was_agreed_to_is_committed_by_its_id() -> None:
    bench = Bench()
    task = await bench.ask()
    (tune,) = bench.sent
    assert isinstance(tune, Tune)
    assert tune == tune_of(bench.new, tune.tune_id)
    bench.tuning.answered(Tuned(tune.tune_id))
    bench.tuning.commit(await task, 7)
    assert bench.sent == [tune, CommitTune(tune.tune_id, 7)]


@pytest.mark.asyncio
async def test_an_answer_to_an_earlier_question_counts_for_nothing() -> None:
    bench = Bench(timeout_s=0.05)
    task = await bench.ask()
    with pytest.raises(NotReady, match=r"did not answer within 0.05 s: the configuration in force stays"):
        await task
    late = bench.sent[0].tune_id
    bench.tuning.answered(Tuned(late))
    task = await bench.ask()
    bench.tuning.answered(Tuned(late))
    bench.tuning.answered(TuneRefused(bench.sent[1].tune_id, "no"))
    with pytest.raises(ReloadRefused, match="the engine refuses: no"):
        await task


@pytest.mark.asyncio
async def test_an_engine_that_ends_or_has_not_loaded_agrees_to_nothing() -> None:
    bench = Bench()
    task = await bench.ask()
    bench.tuning.engine_ended()
    with pytest.raises(NotReady, match="ended before it had agreed"):
        await task
    bench.is_loaded = False
    with pytest.raises(NotReady, match="has not loaded yet"):
        await bench.tuning.propose(bench.old, bench.new)


@pytest.mark.asyncio
async def test_another_engine_that_was_started_with_the_old_configuration_is_started_again() -> None:
    bench = Bench()
    task = await bench.ask()
    bench.tuning.answered(Tuned(bench.sent[0].tune_id))
    agreed = await task
    bench.tuning.engine_ended()
    bench.tuning.engine_started()
    bench.tuning.commit(agreed, 0)
    assert (len(bench.sent), bench.restarts) == (1, 1)
