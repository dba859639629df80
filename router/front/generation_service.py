"""GenerationService: thin RPCs between a client and the journal."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from protos import generation_pb2 as pb
from protos import generation_pb2_grpc
from router.chat import Message, encode_conversation
from router.front.answer import stream_answer
from router.front.journal import ABORTED, End, Entry, Journal
from router.front.sampling_params import Limits, check_ids, check_supported, submit_from
from router.front.service_state import ServiceState
from router.messages import Abort
from router.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

LONG_TEXT = 4096
"""Characters from which on a text is tokenized beside the event loop."""


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers clients."""

    def __init__(
        self,
        journal: Journal,
        state: ServiceState,
        tokenizer: Tokenizer,
        limits: Callable[[], Limits],
        describe: Callable[[], pb.GetModelInfoResponse],
        send: Callable[[object], None],
    ) -> None:
        """`limits` may be called when the engine has loaded; `send` reaches the engine and never blocks."""
        self._journal = journal
        self._state = state
        self._tokenizer = tokenizer
        self._limits = limits
        self._describe = describe
        self._send = send

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one answer. However the call ends, the engine forgets the request."""
        arrived_s = time.monotonic()
        entry = await self._admit(request)
        entry.arrived_s = arrived_s
        skip = (
            request.sampling.skip_special_tokens if request.sampling.HasField("skip_special_tokens") else True
        )
        try:
            if self._state.loaded is not None:
                self._send(entry.submit)
            # An engine that is yet to load gets everything that is open when it has.
            entry.submitted_s = time.monotonic()
            async for response in stream_answer(entry, self._tokenizer, skip):
                yield response
        finally:
            self._leave(entry)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End requests by id; their streams finish with FINISH_REASON_ABORTED."""
        aborted = self._journal.finish(request.request_ids, End(ABORTED))
        for request_id in aborted:
            self._send(Abort(request_id))
        return pb.AbortResponse(aborted=aborted)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Turn text into the ids a prompt of this text would have."""
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._encode(request.text, special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Turn ids into text."""
        ids = list(request.token_ids)
        check_ids(ids, "token_ids", self._tokenizer.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=self._tokenizer.decode(ids, skip))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        """Say what is served and within which limits."""
        return self._describe()

    async def _admit(self, request: pb.GenerateRequest) -> Entry:
        check_supported(request)
        self._state.check_admits()
        self._journal.check_room()
        prompt = await self._prompt_of(request)
        # Tokenizing may have taken a while, and much may have happened meanwhile.
        self._state.check_admits()
        request_id = request.request_id or secrets.token_hex(16)
        return self._journal.open(submit_from(request, request_id, prompt, self._limits()))

    async def _prompt_of(self, request: pb.GenerateRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._encode(request.text, True)
            case "chat":
                messages = [Message(one.role, one.content) for one in request.chat.messages]
                # The first conversation makes a tokenizer, which takes a good part of a second.
                return await asyncio.to_thread(encode_conversation, messages, self._tokenizer)
        return list(request.token_ids.ids)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, "text", add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, "text", add_special_tokens)

    def _leave(self, entry: Entry) -> None:
        if entry.end is None:
            logger.info("request %s: the client left after %d tokens", entry.request_id, len(entry.tokens))
            entry.finish(End(ABORTED))
            self._send(Abort(entry.request_id))
        self._journal.close(entry)
