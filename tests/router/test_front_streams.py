"""Streams over real gRPC, with an engine process that counts instead of computing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos import generation_pb2 as pb
from tests.fake_engine import SILENT, SLOW, token_at
from tests.router.front_fleet import VOCAB_SIZE, Running, front_config, request_of, running_front

pytestmark = pytest.mark.asyncio


def detail_of(error: grpc.aio.AioRpcError, kind: type) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    detail = kind()
    assert status.details[0].Unpack(detail)
    return detail


async def answer(running: Running, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [response async for response in running.stub.Generate(request, timeout=10)]


def text_and_tokens(responses: list[pb.GenerateResponse]) -> tuple[str, list[int]]:
    """What the chunks hold together: how many tokens one of them has depends on how fast they are read."""
    chunks = [response.chunk for response in responses[1:-1]]
    return "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]


async def refusal(running: Running, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(running, request)
    return caught.value


async def test_a_stream_is_started_then_chunks_then_finished(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        events = await answer(running, request_of([20, 5], max_tokens=7, ignore_eos=True, logprobs=1))
        assert events[0].started.prompt_tokens == 2
        text, tokens = text_and_tokens(events)
        assert tokens == [token_at([20], index) for index in range(7)]
        assert text == running.front.tokenizer.decode(tokens)
        assert sum(len(event.chunk.logprobs) for event in events[1:-1]) == 7
        finished = events[-1].finished
        assert finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (2, 7)


async def test_max_tokens_is_bounded_by_what_fits_and_a_stop_token_ends_the_answer(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        events = await answer(running, request_of([70] * 60, ignore_eos=True))
        assert events[-1].finished.usage.completion_tokens == 4
        stopped = (await answer(running, request_of([45])))[-1].finished
        assert stopped.finish_reason == pb.FINISH_REASON_STOP
        assert stopped.matched_stop.token_id == 60


def chat_of(*turns: tuple[str, str]) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages))


async def test_a_conversation_is_rendered_and_answered(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        request = chat_of(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hi!"), ("user", "Bye"))
        written = (
            "<\uff5cbegin\u2581of\u2581sentence\uff5c>Be brief.<\uff5cUser\uff5c>Hi<\uff5cAssistant\uff5c>Hi!"
            "<\uff5cend\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Bye<\uff5cAssistant\uff5c>"
        )
        as_text = pb.GenerateRequest(text=written)
        expected, found = await answer(running, as_text), await answer(running, request)
        assert found[0].started.prompt_tokens == expected[0].started.prompt_tokens
        # The fake engine's tokens depend on the first id of the prompt.
        assert text_and_tokens(found) == text_and_tokens(expected)


async def test_a_conversation_is_refused_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0, with_tokenizer=False)) as running:
        await running.until_ready()
        error = await refusal(running, chat_of(("user", "Hi")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert detail_of(error, error_details_pb2.BadRequest).field_violations[0].field == "chat"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (request_of([]), "token_ids.ids"),
        (request_of([VOCAB_SIZE]), "token_ids.ids[0]"),
        (request_of([5] * 64), "token_ids.ids"),
        (request_of([5], max_tokens=0), "sampling.max_tokens"),
        (request_of([5], temperature=-1), "sampling.temperature"),
        (request_of([5], temperature=float("nan")), "sampling.temperature"),
        (request_of([5], top_p=0), "sampling.top_p"),
        (request_of([5], min_p=0.1), "sampling.min_p"),
        (request_of([5], repetition_penalty=1.1), "sampling.repetition_penalty"),
        (request_of([5], presence_penalty=1), "sampling.presence_penalty"),
        (request_of([5], frequency_penalty=1), "sampling.frequency_penalty"),
        (request_of([5], logit_bias={1: 1.0}), "sampling.logit_bias"),
        (request_of([5], min_tokens=1), "sampling.min_tokens"),
        (request_of([5], n=2), "sampling.n"),
        (request_of([5], stop=["x"]), "sampling.stop"),
        (request_of([5], include_stop=True), "sampling.include_stop"),
        (request_of([5], prompt_logprobs=0), "sampling.prompt_logprobs"),
        (request_of([5], logprobs=1000), "sampling.logprobs"),
        (request_of([5], stop_token_ids=[VOCAB_SIZE]), "sampling.stop_token_ids[0]"),
        (pb.GenerateRequest(text="x", priority=1), "priority"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (chat_of(("user", "a"), ("tool", "b")), "chat.messages[1].role"),
        (chat_of(("user", "long " * 80)), "chat.messages"),
    ],
)
async def test_a_wrong_or_unsupported_field_is_named(
    tmp_path: Path, request_: pb.GenerateRequest, field: str
) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        error = await refusal(running, request_)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        violation = detail_of(error, error_details_pb2.BadRequest).field_violations[0]
        assert violation.field == field
        assert len(running.front.journal) == 0


async def test_unsupported_fields_at_their_defaults_are_fine(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        request = request_of(
            [20], max_tokens=1, min_p=0, repetition_penalty=1, n=1, min_tokens=0, include_stop=False
        )
        assert (await answer(running, request))[-1].HasField("finished")


async def test_a_client_that_leaves_frees_its_request(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        call = running.stub.Generate(request_of([SLOW], ignore_eos=True))
        async for event in call:
            if event.HasField("chunk"):
                break
        call.cancel()
        async with asyncio.timeout(5):
            await running.front.journal.wait_empty()
        await running.until(lambda status: status.num_requests_running == 0)


async def test_a_deadline_ends_a_request_that_gets_no_answer(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in running.stub.Generate(request_of([SILENT]), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await running.front.journal.wait_empty()


async def test_abort_finishes_the_stream_as_aborted(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        request = request_of([SILENT])
        request.request_id = "mine"
        task = asyncio.create_task(answer(running, request))
        async with asyncio.timeout(5):
            while len(running.front.journal) == 0:
                await asyncio.sleep(0.01)
        again = await refusal(running, request)
        assert detail_of(again, error_details_pb2.BadRequest).field_violations[0].field == "request_id"
        response = await running.stub.Abort(pb.AbortRequest(request_ids=["mine", "other"]))
        assert list(response.aborted) == ["mine"]
        events = await task
        assert events[-1].finished.finish_reason == pb.FINISH_REASON_ABORTED


async def test_a_full_queue_says_when_to_try_again(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0, maxQueuedRequests=1)) as running:
        await running.until_ready()
        first = running.stub.Generate(request_of([SILENT]))
        await first.read()
        error = await refusal(running, request_of([20]))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail_of(error, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
        first.cancel()


async def test_an_engine_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        first = running.front.engine.child
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        await running.until(lambda status: status.engine_state == "restarting")
        await running.until_ready()
        second = running.front.engine.child
        assert second is not None
        assert second.pid != first.pid


async def test_draining_refuses_new_requests_and_lets_running_ones_finish(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        task = asyncio.create_task(answer(running, request_of([SLOW], max_tokens=6, ignore_eos=True)))
        async with asyncio.timeout(5):
            while len(running.front.journal) == 0:
                await asyncio.sleep(0.01)
        draining = asyncio.create_task(running.front.drain(10))
        await running.until(lambda status: not status.ready)
        error = await refusal(running, request_of([20]))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail_of(error, error_details_pb2.ErrorInfo).reason == "DRAINING"
        assert (await task)[-1].finished.usage.completion_tokens == 6
        await draining


async def test_a_slow_client_holds_up_nobody(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        slow = running.stub.Generate(request_of([20], ignore_eos=True))
        await slow.read()
        assert len(await answer(running, request_of([30], max_tokens=3))) >= 3
        last = None
        while isinstance(event := await slow.read(), pb.GenerateResponse):
            last = event
        assert last is not None
        assert last.finished.usage.completion_tokens == 63


async def test_health_is_serving_only_when_ready(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 1)) as running:
        health: Any = health_pb2_grpc.HealthStub(running.channel)
        names = ("", "expertmesh.v1.GenerationService", "readiness")

        async def states() -> set[int]:
            return {
                (await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names
            }

        assert await states() == {health_pb2.HealthCheckResponse.NOT_SERVING}
        assert (await refusal(running, request_of([20]))).code() is grpc.StatusCode.UNAVAILABLE
        await running.add_agent("a")
        await running.until_ready()
        assert await states() == {health_pb2.HealthCheckResponse.SERVING}


async def test_token_ids_work_without_a_tokenizer_and_text_is_refused(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0, with_tokenizer=False)) as running:
        await running.until_ready()
        assert (await answer(running, request_of([20], max_tokens=2)))[-1].HasField("finished")
        error = await refusal(running, pb.GenerateRequest(text="hello"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "tokenizer.json" in str(error.details())
