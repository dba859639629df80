"""Workers and engines that are lost at any moment: every stream goes on with the tokens it would have had."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import admin_pb2, generation_pb2
from tests.e2e.conftest import NUM_EXPERTS
from tests.e2e.fleet import Answer, Fleet, fleet_of, generate
from tests.e2e.test_reload import Operator

pytestmark = pytest.mark.e2e

LONG_PROMPT = "A worker that is lost has lost nothing: the router still holds all that it sent. " * 6
STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("Nothing is dropped silently, and", {"temperature": 0.0, "logprobs": 2}),
    (LONG_PROMPT, {"temperature": 0.0, "max_tokens": 24, "logprobs": 1}),
    ("x", {"temperature": 0.9, "seed": 3, "top_k": 40}),
    ("1 2 3 4 5 6 7 8 9", {"temperature": 1.2, "seed": 4, "top_p": 0.9, "logprobs": 0}),
    (LONG_PROMPT[40:], {"temperature": 0.7, "seed": 5, "max_tokens": 48}),
    ("Without a seed there is noise, but of one token there is one choice:", {"top_k": 1}),
]
DEFAULTS: dict[str, Any] = {"max_tokens": 96, "ignore_eos": True}
ENVIRONMENT = {"EXPERTMESH_MAX_PREFILL_TOKENS": "48"}
"""Prompts take many steps."""
SEED = 20


def stream(fleet: Fleet, number: int) -> Answer:
    prompt, how = STREAMS[number]
    return generate(fleet, prompt, **DEFAULTS | how)


def everything(fleet: Fleet, pool: ThreadPoolExecutor) -> list[Future[Answer]]:
    return [pool.submit(stream, fleet, number) for number in range(len(STREAMS))]


def is_recovering(status: admin_pb2.GetStatusResponse) -> bool:
    return status.not_ready_reason.startswith("recovering: ")


Harm = Callable[[Fleet, random.Random], object]


def kill_one(fleet: Fleet, chance: random.Random) -> None:
    chance.choice(fleet.executors()).kill()


def stop_one(fleet: Fleet, chance: random.Random) -> None:
    chance.choice(fleet.executors()).send_signal(signal.SIGSTOP)


def kill_all(fleet: Fleet, chance: random.Random) -> None:
    for executor in fleet.executors():
        executor.kill()


def kill_an_agent(fleet: Fleet, chance: random.Random) -> None:
    agent = chance.choice(fleet.executors()).parent()
    assert agent is not None
    agent.kill()


def kill_another_meanwhile(fleet: Fleet, chance: random.Random) -> None:
    first, second = fleet.executors()
    first.kill()
    fleet.wait_until(is_recovering)
    second.kill()


def kill_the_engine(fleet: Fleet, chance: random.Random) -> None:
    fleet.engine().kill()


def reload_meanwhile(fleet: Fleet, chance: random.Random) -> None:
    kill_one(fleet, chance)
    fleet.wait_until(is_recovering)
    level = fleet.status().ep_level
    assert Operator(fleet).reload(ep_level=3 - level, micro_batches=3).applied
    assert fleet.status().ep_level == 3 - level


FLEETS: dict[str, tuple[int, int, dict[str, str], list[Harm]]] = {
    "AllGather, shared memory": (
        *(2, 1, {"EXPERTMESH_SAME_HOST_TRANSPORT": "sharedMemory"}),
        [kill_one, stop_one, kill_all, kill_an_agent, kill_the_engine, reload_meanwhile],
    ),
    "AllToAll, links": (
        *(2, 2, {"EXPERTMESH_SAME_HOST_TRANSPORT": "links"}),
        [stop_one, kill_another_meanwhile],
    ),
    "AllToAll, three workers, micro-batches": (3, 2, {"EXPERTMESH_MICRO_BATCHES": "2"}, [kill_one]),
    "collective": (2, 2, {"EXPERTMESH_EXCHANGE": "collective"}, [kill_one]),
    "no workers": (0, 1, {}, [kill_the_engine]),
}
"""Workers, level, how rows travel, and what happens to them one after the other."""


@pytest.fixture(scope="module")
def undisturbed(v3_model: Path) -> list[Answer]:
    return answers_of_one_process(v3_model)


def answers_of_one_process(model: Path) -> list[Answer]:
    """What it answers if nothing happens to it."""
    with fleet_of(model, "--expert-workers", "0", **ENVIRONMENT) as fleet, ThreadPoolExecutor(6) as pool:
        return [answer.result(60) for answer in everything(fleet, pool)]


def endure(fleet: Fleet, harm: Harm, chance: random.Random, expected: list[Answer]) -> None:
    """Do harm at some moment of all streams; they must not notice more than a pause."""
    before = fleet.status()
    with ThreadPoolExecutor(len(STREAMS)) as pool:
        answers = everything(fleet, pool)
        time.sleep(chance.uniform(0, 0.8))
        harm(fleet, chance)
        assert [answer.result(60) for answer in answers] == expected
    after = fleet.wait_until(lambda status: status.ready and status.recoveries > before.recoveries)
    assert after.epoch > before.epoch or not after.workers
    assert after.recovery_seconds > 0
    fleet.wait_until(lambda status: status.kv_blocks_used == 0)


@pytest.mark.parametrize("way", FLEETS)
def test_streams_go_on_with_the_same_bits_whoever_is_lost_and_whenever(
    v3_model: Path, undisturbed: list[Answer], way: str
) -> None:
    num_workers, ep_level, environment, harms = FLEETS[way]
    flags = ("--expert-workers", str(num_workers), "--ep-level", str(ep_level))
    chance = random.Random(SEED)
    with fleet_of(v3_model, *flags, **ENVIRONMENT, **environment) as fleet:
        for harm in harms:
            endure(fleet, harm, chance, undisturbed)


def test_streams_of_a_quantised_checkpoint_go_on_with_the_same_bits_too(w8a8_model: Path) -> None:
    expected = answers_of_one_process(w8a8_model)
    chance = random.Random(SEED)
    # Native code writes these rows and answers them.
    how = {"EXPERTMESH_SAME_HOST_TRANSPORT": "sharedMemory"}
    with fleet_of(w8a8_model, "--expert-workers", "2", "--ep-level", "2", **ENVIRONMENT, **how) as fleet:
        for harm in (kill_one, stop_one, kill_all, kill_the_engine, reload_meanwhile):
            endure(fleet, harm, chance, expected)


@pytest.mark.slow
def test_streams_survive_loss_after_loss_at_moments_that_differ_from_run_to_run(
    v3_model: Path, undisturbed: list[Answer]
) -> None:
    num_workers, ep_level, environment, harms = FLEETS["AllGather, shared memory"]
    flags = ("--expert-workers", str(num_workers), "--ep-level", str(ep_level))
    chance = random.Random()
    with fleet_of(v3_model, *flags, **ENVIRONMENT, **environment) as fleet:
        for _ in range(4):
            endure(fleet, chance.choice(harms), chance, undisturbed)


def test_while_a_worker_is_away_requests_are_queued_and_who_leaves_frees_its_blocks(
    v3_model: Path, undisturbed: list[Answer]
) -> None:
    with fleet_of(v3_model, "--expert-workers", "2", **ENVIRONMENT) as fleet, ThreadPoolExecutor(3) as pool:
        stays = pool.submit(stream, fleet, 0)
        named = generation_pb2.GenerateRequest(text=LONG_PROMPT, request_id="leaves")
        leaves = fleet.generation().Generate(named, timeout=60)
        fleet.wait_until(lambda status: status.num_requests_running == 2)
        with fleet.without_executor(0):
            fleet.wait_until(is_recovering)
            queued = pool.submit(stream, fleet, 2)
            status = fleet.wait_until(lambda status: "3 streams wait" in status.not_ready_reason)
            held = status.kv_blocks_used
            fleet.generation().Abort(generation_pb2.AbortRequest(request_ids=["leaves"]))
            fleet.wait_until(lambda status: 0 < status.kv_blocks_used < held)
            *_, last = leaves
            assert last.finished.finish_reason == generation_pb2.FINISH_REASON_ABORTED
            with pytest.raises(grpc.RpcError) as caught:
                generate(fleet, "too late", timeout=0.5)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert [stays.result(60), queued.result(60)] == [undisturbed[0], undisturbed[2]]
        fleet.wait_until(lambda status: status.kv_blocks_used == 0)


@pytest.mark.parametrize("ep_level", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_who_holds_all_experts_goes_on_without_the_lost_one_which_joins_later(
    v3_model: Path, undisturbed: list[Answer], ep_level: int
) -> None:
    redundant = {"EXPERTMESH_REDUNDANT_EXPERTS": str(NUM_EXPERTS)}
    flags = ("--expert-workers", "3", "--ep-level", str(ep_level))
    with fleet_of(v3_model, *flags, **ENVIRONMENT, **redundant) as fleet, ThreadPoolExecutor(6) as pool:
        answers = everything(fleet, pool)
        fleet.wait_until(lambda status: status.num_requests_running > 1)
        with fleet.without_executor(1):
            assert [answer.result(60) for answer in answers] == undisturbed
            status = fleet.status()
            assert (status.ready, num_serving(status)) == (True, 2)
            answers = everything(fleet, pool)
        fleet.wait_until(lambda status: num_serving(status) == 3)
        answers += everything(fleet, pool)
        assert [answer.result(60) for answer in answers] == 2 * undisturbed
        status = fleet.wait_until(lambda status: status.kv_blocks_used == 0)
        assert (status.ready, status.recoveries) == (True, 1)


def num_serving(status: admin_pb2.GetStatusResponse) -> int:
    return sum(worker.ep_rank >= 0 for worker in status.workers)


def test_up_ends_while_answers_wait(v3_model: Path) -> None:
    drain = {"EXPERTMESH_DRAIN_TIMEOUT_SECONDS": "0.5"}
    with fleet_of(v3_model, "--expert-workers", "2", **drain) as fleet, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, fleet, "x", max_tokens=3000, ignore_eos=True)
        fleet.wait_until(lambda status: status.num_requests_running == 1)
        for executor in fleet.executors():
            agent = executor.parent()
            assert agent is not None
            executor.kill()
            agent.kill()
        fleet.wait_until(is_recovering)
        began_s = time.monotonic()
        fleet.process.send_signal(signal.SIGTERM)
        assert fleet.process.wait(20) == 0
        assert time.monotonic() - began_s < 10
        error = answer.exception(timeout=10)
        assert isinstance(error, grpc.RpcError)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
