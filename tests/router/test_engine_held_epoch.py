"""An epoch the engine holds for a reload: taken up with its Tune between two steps, or let go unnoticed."""

from __future__ import annotations

from router.engine import Membership
from router.messages import Lost, Tuned
from tests.router.engine_child import tune
from tests.router.test_engine import Bench, ScriptedExchange, request

TUNE = tune(tune_id=5, ep_level=1, micro_batches=2, deadline_floor_s=9.0)


def hold(bench: Bench, epoch: int = 2) -> ScriptedExchange:
    exchange = ScriptedExchange()
    bench.engine.hold(
        Membership(epoch, exchange, 2, list, bench.floors.append, waits_for_commit=True),
    )
    return exchange


def test_a_held_epoch_and_its_tune_act_from_the_same_step_on() -> None:
    bench = Bench()
    first = bench.adopt()
    bench.engine.submit(request("a", 5))
    bench.engine.step()
    bench.engine.tune(TUNE)
    second = hold(bench)
    bench.engine.step()
    assert [(header.epoch, header.ep_level) for header in first.headers] == [(1, 2), (1, 2)]
    assert (second.headers, first.is_closed, bench.engine.epoch) == ([], False, 1)
    bench.engine.commit(5, 2)
    assert (first.is_closed, bench.engine.epoch, bench.floors) == (True, 2, [9.0])
    bench.engine.step()
    assert [(header.epoch, header.ep_level, header.step_id) for header in second.headers] == [(2, 1, 3)]
    assert len(first.headers) == 2


def test_an_idle_engine_reports_the_epoch_it_has_committed_at_once() -> None:
    bench = Bench()
    bench.adopt()
    bench.engine.tune(TUNE)
    hold(bench)
    bench.engine.commit(5, 2)
    bench.engine.report()
    assert bench.sent[-1].epoch == 2


def test_a_held_epoch_that_is_given_up_or_superseded_is_closed_and_the_one_in_force_goes_on() -> None:
    bench = Bench()
    first = bench.adopt()
    bench.engine.submit(request("a", 5))
    given_up, superseded = hold(bench, 2), hold(bench, 3)
    assert (given_up.is_closed, superseded.is_closed) == (True, False)
    bench.engine.disconnect(2, "late")
    assert not superseded.is_closed
    bench.engine.disconnect(3, "the reload was given up")
    assert superseded.is_closed
    bench.engine.step()
    assert [header.epoch for header in first.headers] == [1]
    assert bench.said(Lost) == []
    stale = hold(bench, 4)
    bench.adopt(epoch=5)
    assert stale.is_closed


def test_a_loss_while_an_epoch_is_held_ends_both_and_is_told_again_of_the_one_that_is_committed() -> None:
    bench = Bench()
    bench.adopt(lost_in_step=1)
    bench.engine.tune(TUNE)
    held = hold(bench)
    bench.engine.submit(request("a", 5))
    bench.engine.step()
    (lost,) = bench.said(Lost)
    assert (lost.epoch, lost.ep_rank, held.is_closed) == (1, 1, True)
    # The front had said so before it heard of the loss.
    bench.engine.commit(5, 2)
    again = bench.said(Lost)[1]
    assert (again.epoch, again.ep_rank, again.message) == (2, 1, lost.message)
    assert not bench.engine.has_work
    exchange = bench.adopt(epoch=3)
    steady = Bench()
    steady.adopt()
    steady.engine.submit(request("a", 5))
    assert bench.run() == steady.run()
    # The Tune was taken up all the same, by the step that is computed again too.
    assert [(one.ep_level, one.micro_batches) for one in exchange.headers[:2]] == [(1, 2), (1, 1)]
    assert bench.said(Tuned) == [Tuned(5)]


def test_an_engine_that_ends_closes_what_it_holds() -> None:
    bench = Bench()
    bench.adopt()
    held = hold(bench)
    bench.engine.close()
    assert held.is_closed
