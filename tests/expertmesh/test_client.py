"""The client: events are typed, failed calls are one sentence. Against real gRPC servers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from common.errors import ControlError, ExpertMeshError, NotReady, QueueFull, RequestError, StreamLost
from expertmesh.admin_client import AdminClient
from expertmesh.client import Chunk, Client, Finished, Logprob, Message, Sampling, Started
from protos import generation_pb2 as pb
from protos import generation_pb2_grpc

pytestmark = pytest.mark.asyncio


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


async def answer_of(target: str) -> str:
    async with Client(target) as client:
        return (await client.answer("Hello")).text


async def test_a_router_that_is_not_there_is_one_sentence() -> None:
    target = f"127.0.0.1:{closed_port()}"
    with pytest.raises(ControlError, match=rf"^nothing listens on {target} \(connection refused\)"):
        await answer_of(target)
    async with AdminClient(target) as admin:
        with pytest.raises(ControlError, match="connection refused"):
            await admin.status()


async def test_a_host_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(ControlError, match=r"^the host of no-such-host.invalid:1 cannot be resolved"):
        await answer_of("no-such-host.invalid:1")


class Scripted(generation_pb2_grpc.GenerationServiceServicer):
    """A server that streams what it was given, then fails if it was given a failure."""

    def __init__(
        self, responses: list[pb.GenerateResponse], failure: status_pb2.Status | None = None
    ) -> None:
        self.responses = responses
        self.failure = failure
        self.requests: list[pb.GenerateRequest] = []

    async def Generate(  # noqa: N802 - the contract's name
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        for response in self.responses:
            yield response
        if self.failure is not None:
            await context.abort_with_status(rpc_status.to_status(self.failure))


def scripted(*responses: pb.GenerateResponse, failure: status_pb2.Status | None = None) -> Scripted:
    # The stubs want every call of the service implemented; the others answer UNIMPLEMENTED here.
    return Scripted(list(responses), failure)  # type: ignore[abstract]


async def serve(service: Scripted) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_the_events_of_a_stream_are_typed() -> None:
    entry = pb.TokenLogprob(token_id=5, logprob=-0.5, text="a")
    entry.top.add(token_id=5, logprob=-0.5, text="a")
    finished = pb.Finished(finish_reason=pb.FINISH_REASON_STOP)
    finished.usage.prompt_tokens = 3
    finished.usage.completion_tokens = 1
    finished.matched_stop.token_id = 1
    service = scripted(
        pb.GenerateResponse(started=pb.Started(prompt_tokens=3, request_id="r")),
        pb.GenerateResponse(chunk=pb.Chunk(token_ids=[5], text="a", logprobs=[entry])),
        pb.GenerateResponse(finished=finished),
    )
    server, target = await serve(service)
    async with Client(target) as client:
        sampling = Sampling(temperature=0.0, max_tokens=1)
        events = [event async for event in client.generate([1, 2, 3], sampling)]
    await server.stop(0)

    same = Logprob(5, -0.5, "a")
    assert events[0] == Started("r", 3, 0)
    assert events[1] == Chunk("a", (5,), (Logprob(5, -0.5, "a", (same,)),))
    assert isinstance(events[2], Finished)
    assert (events[2].finish_reason, events[2].stop_token_id, events[2].completion_tokens) == ("stop", 1, 1)
    sent = service.requests[0]
    assert list(sent.token_ids.ids) == [1, 2, 3]
    # Unset means the router's default, zero means zero.
    assert sent.sampling.HasField("temperature")
    assert not sent.sampling.HasField("top_p")


async def test_a_conversation_is_sent_as_messages() -> None:
    service = scripted(pb.GenerateResponse(finished=pb.Finished()))
    server, target = await serve(service)
    async with Client(target) as client:
        await client.answer([Message("system", "Be brief."), Message("user", "Hi")])
    await server.stop(0)
    sent = service.requests[0]
    assert sent.WhichOneof("prompt") == "chat"
    messages = [(one.role, one.content) for one in sent.chat.messages]
    assert messages == [("system", "Be brief."), ("user", "Hi")]


def packed(detail: error_details_pb2.BadRequest) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(detail)
    return box


def violation(field: str) -> error_details_pb2.BadRequest:
    one = error_details_pb2.BadRequest.FieldViolation(field=field)
    return error_details_pb2.BadRequest(field_violations=[one])


FAILURES = [
    (code_pb2.INVALID_ARGUMENT, violation("sampling.top_p"), RequestError, "field", "sampling.top_p"),
    (
        code_pb2.RESOURCE_EXHAUSTED,
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000)),
        QueueFull,
        "retry_after_s",
        2.5,
    ),
    (code_pb2.UNAVAILABLE, error_details_pb2.ErrorInfo(reason="NOT_READY"), NotReady, "reason", "NOT_READY"),
    (
        code_pb2.UNAVAILABLE,
        error_details_pb2.ErrorInfo(reason="WORKER_LOST"),
        StreamLost,
        "reason",
        "WORKER_LOST",
    ),
]


@pytest.mark.parametrize(("code", "detail", "kind", "attribute", "value"), FAILURES)
async def test_a_failed_call_becomes_the_error_it_was(
    code: int,
    detail: error_details_pb2.BadRequest,
    kind: type[ExpertMeshError],
    attribute: str,
    value: str | float,
) -> None:
    failure = status_pb2.Status(code=code, message="said the router", details=[packed(detail)])
    server, target = await serve(scripted(failure=failure))
    with pytest.raises(kind, match=r"^said the router$") as caught:
        await answer_of(target)
    await server.stop(0)
    assert getattr(caught.value, attribute) == value


async def test_a_server_without_the_service_is_named_as_such() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(ControlError, match=f"^127.0.0.1:{port} does not serve this call"):
        await answer_of(f"127.0.0.1:{port}")
    await server.stop(0)
