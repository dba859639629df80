"""Losses in the middle of steps: every answer is, event for event, what it is without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import WorkerLost
from common.exchange import Dispatched, RowOrigins, StepHeader
from router.engine import Membership
from router.messages import AskLoads, Lost, Stats, Submit
from router.scheduler import Limits
from tests.router.engine_child import tune
from tests.router.test_engine import Bench, ScriptedExchange, request, requests


@dataclass
class FailingExchange(ScriptedExchange):
    """Loses its worker at one of its calls, counted from the first `begin`."""

    fails_at: int = -1
    num_calls: int = 0

    def begin(self, header: StepHeader, origins: Sequence[RowOrigins] = ()) -> None:
        super().begin(header, origins)
        self._call("begin")

    def dispatch(self, layer_id: int, micro_batch: int, *given: Tensor) -> Dispatched:
        self._call("dispatch")
        return super().dispatch(layer_id, micro_batch, *given)

    def combine(self, dispatched: Dispatched) -> Tensor:
        self._call("combine")
        return super().combine(dispatched)

    def _call(self, phase: str) -> None:
        self.num_calls += 1
        if self.num_calls - 1 == self.fails_at:
            raise WorkerLost(1, "w1", 0, phase, 640, 0.25, "connection reset")


def adopt(bench: Bench, epoch: int, fails_at: int = -1) -> FailingExchange:
    exchange = FailingExchange(fails_at=fails_at)
    bench.engine.adopt(Membership(epoch, exchange, 2, list, bench.floors.append))
    return exchange


def undisturbed(submits: Sequence[Submit], limits: Limits) -> dict[str, list[dict[str, Any]]]:
    steady = Bench(limits)
    steady.adopt()
    for submit in submits:
        steady.engine.submit(submit)
    return steady.run()


@settings(max_examples=80, deadline=None)
@given(
    submits=requests,
    spare=st.integers(0, 12),
    max_batch_size=st.integers(1, 6),
    max_prefill_tokens=st.integers(1, 40),
    micro_batches=st.integers(1, 3),
    failures=st.lists(st.integers(0, 30), max_size=12),
)
def test_every_event_is_the_same_however_often_a_worker_is_lost_and_wherever_in_a_step(
    submits: list[Submit],
    spare: int,
    max_batch_size: int,
    max_prefill_tokens: int,
    micro_batches: int,
    failures: list[int],
) -> None:
    limits = Limits(25 + spare, 4, max_batch_size, max_prefill_tokens, max_seq_len=100)
    expected = undisturbed(submits, limits)
    bench = Bench(limits, micro_batches)
    # Half of the requests come while nobody is there to compute them.
    for submit in submits[::2]:
        bench.engine.submit(submit)
    for epoch, fails_at in enumerate(failures, start=1):
        adopt(bench, epoch, fails_at)
        bench.run()
    for submit in submits[1::2]:
        bench.engine.submit(submit)
    adopt(bench, 99)
    assert bench.run() == expected
    assert bench.scheduler.num_blocks_used == 0


def test_a_lost_worker_is_told_once_and_the_same_plan_runs_again_under_the_next_header() -> None:
    bench = Bench()
    first = adopt(bench, 1, fails_at=7)  # the dispatch of the third step
    bench.engine.submit(request("a"))
    assert len(bench.run()["a"]) == 2
    (lost,) = bench.said(Lost)
    assert (lost.epoch, lost.ep_rank) == (1, 1)
    for words in ("w1", "layer 0", "dispatch"):
        assert words in lost.message
    assert first.is_closed
    bench.engine.report()
    waiting = bench.said(Stats)[-1]
    assert (waiting.epoch, waiting.num_running, waiting.replayed_steps) == (0, 1, 0)
    bench.engine.submit(request("late"))
    second = adopt(bench, 2)
    bench.engine.step()
    told = bench.said(Stats)[-1]
    assert (told.epoch, told.replayed_steps) == (2, 1)
    # Who came meanwhile is not in the step that is computed again.
    assert [(one.epoch, one.step_id, one.num_tokens) for one in second.headers] == [(2, 4, 1)]
    bench.engine.step()
    assert second.headers[1].num_tokens == 6


def test_a_request_that_is_aborted_while_its_plan_waits_leaves_nothing_behind() -> None:
    bench = Bench()
    adopt(bench, 1, fails_at=7)
    for name in ("kept", "gone"):
        bench.engine.submit(request(name))
    bench.run()
    bench.engine.abort("gone")
    # The next one gets the blocks that were freed, and its rows are the only ones written there.
    bench.engine.submit(request("next", 8))
    exchange = adopt(bench, 2)
    events = bench.run()
    expected = undisturbed([request("kept"), request("next", 8)], bench.scheduler.limits)
    assert {name: events[name] for name in ("kept", "next")} == expected
    assert len(events["gone"]) == 2
    assert exchange.headers[0].num_tokens == 1
    assert bench.scheduler.num_blocks_used == 0


def test_when_everybody_has_left_there_is_nothing_to_compute_again() -> None:
    bench = Bench()
    adopt(bench, 1, fails_at=4)
    bench.engine.submit(request("a"))
    bench.run()
    bench.engine.abort("a")
    exchange = adopt(bench, 2)
    assert not bench.engine.has_work
    bench.engine.report()
    assert bench.said(Stats)[-1] == Stats(0, 0, 0, 2, 2)
    assert exchange.headers == []


@pytest.mark.parametrize("change", [{"max_batch_size": 1}, {"max_prefill_tokens": 1}, {"micro_batches": 3}])
def test_a_configuration_that_changes_before_the_replay_changes_no_event(change: dict[str, int]) -> None:
    submits = [request(name, 20, temperature=1.0, seed=index) for index, name in enumerate("abc")]
    bench = Bench()
    adopt(bench, 1, fails_at=5)
    for submit in submits:
        bench.engine.submit(submit)
    bench.run()
    bench.engine.tune(tune(ep_level=1, tune_id=4, **change))
    bench.engine.commit(4)
    exchange = adopt(bench, 2)
    assert bench.run() == undisturbed(submits, bench.scheduler.limits)
    assert {one.ep_level for one in exchange.headers} == {1}


@settings(max_examples=40, deadline=None)
@given(submits=requests, num_steps=st.integers(1, 30), max_prefill_tokens=st.integers(1, 40))
def test_another_engine_goes_on_with_the_answers_of_one_that_died(
    submits: list[Submit], num_steps: int, max_prefill_tokens: int
) -> None:
    limits = Limits(37, 4, 3, max_prefill_tokens, max_seq_len=100)
    dead, heir = Bench(limits), Bench(limits)
    for bench in (dead, heir):
        bench.adopt()
    for submit in submits:
        dead.engine.submit(submit)
    for _ in range(num_steps):
        dead.engine.step()
    events = dead.events()
    for submit in submits:
        given = events.setdefault(submit.request_id, [])
        if not given or given[-1]["fin"] is None:
            heir.engine.submit(replace(submit, generated=[event["token"] for event in given]))
    for name, rest in heir.run().items():
        events[name] += rest
    assert events == undisturbed(submits, limits)
    assert heir.scheduler.num_blocks_used == 0


def test_choices_of_a_step_that_is_computed_again_count_once() -> None:
    counted = []
    for fails_at in (-1, 2, 5, 8):
        bench = Bench()
        adopt(bench, 1, fails_at)
        bench.engine.submit(request("a", 20))
        bench.run()
        adopt(bench, 2)
        bench.run()
        bench.engine.report_loads(AskLoads(1))
        counted.append(bench.sent[-1].layers)
    assert counted == [[[0, [20 + 12 - 1]]]] * 4
