"""The engine takes up another way of running steps: asked first, told later, between two steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.channel import Fatal
from common.errors import ControlError
from router.messages import CommitTune, Tokens, Tuned, TuneRefused
from tests.router.engine_child import Answer, engine, note
from tests.router.engine_child import tune as tune_with
from tests.router.test_engine import ROOMY, Bench, request
from tests.router.test_engine_process import SMALL, mixed_requests
from tests.tiny_checkpoint import write_checkpoint

TUNE = tune_with(
    tune_id=5, ep_level=1, micro_batches=2, max_batch_size=3, max_prefill_tokens=7, deadline_floor_s=9.0
)


def test_a_tune_changes_nothing_until_it_is_committed_and_then_acts_from_the_next_step_on() -> None:
    bench = Bench()
    exchange = bench.adopt()
    bench.engine.submit(request("a", 5))
    bench.engine.step()
    bench.engine.tune(TUNE)
    bench.engine.step()
    assert bench.said(Tuned) == [Tuned(5)]
    assert [(header.ep_level, header.micro_batches) for header in exchange.headers] == [(2, 1), (2, 1)]
    assert bench.floors == []
    bench.engine.commit(5)
    bench.engine.submit(request("b", 20))
    bench.engine.step()
    header = exchange.headers[-1]
    assert (header.ep_level, header.micro_batches) == (1, 2)
    # The prompt of b is cut by the new max_prefill_tokens.
    assert header.num_tokens < 20
    limits = bench.scheduler.limits
    assert (limits.max_batch_size, limits.max_prefill_tokens) == (3, 7)
    assert limits == replace(ROOMY, max_batch_size=3, max_prefill_tokens=7)
    assert bench.floors == [9.0]


def test_the_next_epoch_has_the_deadline_that_was_committed() -> None:
    bench = Bench()
    bench.engine.tune(TUNE)
    bench.engine.commit(5)
    bench.adopt()
    assert bench.floors == [9.0]


def test_answers_are_the_same_however_often_the_steps_are_tuned() -> None:
    requests = [request(name, 5 + 9 * number, max_tokens=30) for number, name in enumerate("abc")]
    undisturbed, tuned = Bench(), Bench()
    for bench in (undisturbed, tuned):
        bench.adopt()
        for one in requests:
            bench.engine.submit(one)
    expected = undisturbed.run()
    number = 0
    while tuned.engine.has_work:
        number += 1
        tune = replace(TUNE, tune_id=number, ep_level=1 + number % 2, micro_batches=1 + number % 3)
        tuned.engine.tune(replace(tune, max_batch_size=1 + number % 4, max_prefill_tokens=1 + number % 20))
        tuned.engine.commit(number)
        tuned.engine.step()
    assert number > 30
    assert tuned.events() == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ep_level": 3}, "ep_level is 3"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"chunk_rows": -1}, "chunk_rows -1"),
        ({"buffer_factors": []}, "bound nothing"),
        ({"max_prefill_tokens": -1}, "max_prefill_tokens is -1"),
        ({"deadline_floor_s": 0.0}, "deadline_floor_s is 0"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_and_cannot_be_committed(
    change: dict[str, Any], words: str
) -> None:
    bench = Bench()
    bench.engine.tune(replace(TUNE, tune_id=4))
    bench.engine.tune(replace(TUNE, **change))
    (refused,) = bench.said(TuneRefused)
    assert refused.tune_id == 5
    assert words in refused.reason
    for tune_id in (4, 5):
        with pytest.raises(ControlError, match=f"CommitTune {tune_id} follows no Tune"):
            bench.engine.commit(tune_id)


def test_only_the_last_tune_can_be_committed_and_only_once() -> None:
    bench = Bench()
    bench.engine.tune(TUNE)
    bench.engine.tune(replace(TUNE, tune_id=6))
    bench.engine.commit(6)
    for tune_id in (5, 6):
        with pytest.raises(ControlError, match=f"CommitTune {tune_id}"):
            bench.engine.commit(tune_id)


def test_a_real_engine_that_is_tuned_between_its_steps_gives_the_same_bits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", **SMALL)
    with engine(tmp_path) as (child, _):
        expected = child.answer(mixed_requests())
        answers = {one.request_id: Answer() for one in mixed_requests()}
        child.send(*mixed_requests())
        number = 0
        while any(answer.finish_reason is None for answer in answers.values()):
            message = child.until(Tokens)
            for event in message.events:
                note(answers[str(event["id"])], event)
            number += 1
            tune = replace(TUNE, tune_id=number, ep_level=1 + number % 2, micro_batches=1 + number % 3)
            child.send(replace(tune, max_batch_size=8), CommitTune(number))
        child.until(Tuned, lambda tuned: tuned.tune_id == number)
        assert answers == expected
        assert sum(isinstance(message, Tuned) for message in child.seen) > 10


def test_committing_what_was_not_agreed_to_ends_the_engine(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", **SMALL)
    with engine(tmp_path) as (child, _):
        child.send(CommitTune(3))
        while not isinstance(message := child.next(), Fatal):
            assert message is not None
        assert "CommitTune 3 follows no Tune" in message.message
