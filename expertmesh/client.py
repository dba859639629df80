"""The Python client: asynchronous, typed, without torch. One Client talks to one router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from expertmesh.call_errors import error_from
from protos import generation_pb2, generation_pb2_grpc

CHANNEL_OPTIONS = [
    # gRPC would send every call through http_proxy, calls to 127.0.0.1 as well.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Separate from keepalive_timeout_ms and 60 s by default: a frozen router would go unnoticed for a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
]
CALL_TIMEOUT_S = 10.0

FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_ABORTED: "aborted",
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. None leaves the router's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None

    def message(self) -> generation_pb2.SamplingParams:
        """The same as a protobuf message."""
        return generation_pb2.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""What to continue: a text, token ids, or a conversation whose next turn is the assistant's."""


@dataclass(frozen=True, slots=True)
class Started:
    """The request was taken in."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural log-probability of one token under the raw logits; `top` is most likely first."""

    token_id: int
    logprob: float
    text: str
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of the answer. The texts of all chunks, joined, are exactly the answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. `finish_reason` is "stop", "length" or "aborted"."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    stop_token_id: int | None = None


Event = Started | Chunk | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finished: Finished | None
    logprobs: tuple[Logprob, ...] = field(default=())


class Client:
    """Generates text. Every method raises an error of common.errors whose message is one sentence."""

    def __init__(self, target: str) -> None:
        """`target` is the router's HOST:PORT."""
        self.target = target
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running answers end."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[Event]:
        """Stream the answer to a text, token ids or a conversation. Leaving the loop cancels the request."""
        request = generation_pb2.GenerateRequest(
            request_id=request_id, sampling=(sampling or Sampling()).message()
        )
        _set_prompt(request, prompt)
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for response in call:
                if event := event_from(response):
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error
        finally:
            call.cancel()

    async def answer(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Answer:
        """Wait for the whole answer."""
        chunks: list[Chunk] = []
        finished = None
        async for event in self.generate(prompt, sampling, timeout_s=timeout_s):
            if isinstance(event, Chunk):
                chunks.append(event)
            elif isinstance(event, Finished):
                finished = event
        return Answer(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finished=finished,
            logprobs=tuple(one for chunk in chunks for one in chunk.logprobs),
        )

    async def abort(self, *request_ids: str) -> list[str]:
        """End requests by id; return those that were running or waiting."""
        request = generation_pb2.AbortRequest(request_ids=request_ids)
        try:
            return list((await self._stub.Abort(request, timeout=CALL_TIMEOUT_S)).aborted)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids a prompt of this text would have."""
        request = generation_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        try:
            return list((await self._stub.Tokenize(request, timeout=CALL_TIMEOUT_S)).token_ids)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens."""
        request = generation_pb2.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        try:
            return (await self._stub.Detokenize(request, timeout=CALL_TIMEOUT_S)).text
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error

    async def model(self) -> generation_pb2.GetModelInfoResponse:
        """What is served and within which limits."""
        try:
            return await self._stub.GetModelInfo(generation_pb2.GetModelInfoRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.target) from error


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    # An empty prompt is sent too, so that the router says what is wrong with it.
    request.token_ids.SetInParent()
    for one in prompt:
        if isinstance(one, Message):
            request.chat.messages.add(role=one.role, content=one.content)
        else:
            request.token_ids.ids.append(one)


def event_from(response: generation_pb2.GenerateResponse) -> Event | None:
    """One message of the stream as an event; None for a kind this client does not know yet."""
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(started.request_id, started.prompt_tokens, started.cached_tokens)
        case "chunk":
            return Chunk(
                text=response.chunk.text,
                token_ids=tuple(response.chunk.token_ids),
                logprobs=tuple(_logprob_from(entry) for entry in response.chunk.logprobs),
            )
        case "finished":
            return _finished_from(response.finished)
    return None


def _logprob_from(entry: generation_pb2.TokenLogprob) -> Logprob:
    top = tuple(Logprob(one.token_id, one.logprob, one.text) for one in entry.top)
    return Logprob(entry.token_id, entry.logprob, entry.text, top)


def _finished_from(finished: generation_pb2.Finished) -> Finished:
    matched = finished.matched_stop
    return Finished(
        finish_reason=FINISH_REASONS.get(finished.finish_reason, "unknown"),
        prompt_tokens=finished.usage.prompt_tokens,
        completion_tokens=finished.usage.completion_tokens,
        queue_s=finished.timings.queue_s,
        first_token_s=finished.timings.first_token_s,
        total_s=finished.timings.total_s,
        stop_token_id=matched.token_id if matched.WhichOneof("match") == "token_id" else None,
    )
