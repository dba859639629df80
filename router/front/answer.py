"""One answer as a stream of GenerateResponse: started, chunks, finished."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from protos import generation_pb2 as pb
from router.front.journal import ABORTED, LENGTH, STOP, End, Entry
from router.tokenizer import Detokenizer, Tokenizer

REASONS = {
    STOP: pb.FINISH_REASON_STOP,
    LENGTH: pb.FINISH_REASON_LENGTH,
    ABORTED: pb.FINISH_REASON_ABORTED,
}


async def stream_answer(
    entry: Entry, tokenizer: Tokenizer, skip_special_tokens: bool
) -> AsyncIterator[pb.GenerateResponse]:
    """Yield the events of one answer as its tokens arrive; tokens that waited for the client travel together.

    Raises:
        ExpertMeshError: the answer cannot be continued.
    """
    yield pb.GenerateResponse(
        started=pb.Started(prompt_tokens=len(entry.submit.prompt), request_id=entry.request_id)
    )
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    position = 0
    while True:
        await entry.wait_beyond(position)
        tokens, end = entry.tokens[position:], entry.end
        text = detokenizer.add(_with_text(tokens, end))
        if end is not None:
            text += detokenizer.finish()
        if tokens or text:
            logprobs = _logprobs(entry, position, len(tokens), tokenizer)
            yield pb.GenerateResponse(chunk=pb.Chunk(token_ids=tokens, text=text, logprobs=logprobs))
        position += len(tokens)
        if end is not None:
            break
    if end.error is not None:
        raise end.error
    yield pb.GenerateResponse(finished=_finished(entry, end))


def _with_text(tokens: Sequence[int], end: End | None) -> Sequence[int]:
    """The token that stopped the answer is reported, but its text is not part of the answer."""
    return tokens[:-1] if end is not None and end.reason == STOP else tokens


def _logprobs(entry: Entry, start: int, count: int, tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    if entry.submit.logprobs is None:
        return []
    return [
        pb.TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            text=tokenizer.token_text(token_id),
            top=[
                pb.AlternativeLogprob(token_id=other, logprob=value, text=tokenizer.token_text(other))
                for other, value in top
            ],
        )
        for token_id, (logprob, top) in zip(
            entry.tokens[start : start + count], entry.logprobs[start : start + count], strict=False
        )
    ]


def _finished(entry: Entry, end: End) -> pb.Finished:
    finished = pb.Finished(
        finish_reason=REASONS[end.reason],
        usage=pb.Usage(prompt_tokens=len(entry.submit.prompt), completion_tokens=len(entry.tokens)),
        timings=pb.Timings(
            queue_s=max(entry.submitted_s - entry.arrived_s, 0.0),
            first_token_s=max(entry.first_token_s - entry.arrived_s, 0.0),
            total_s=max(entry.last_token_s - entry.arrived_s, 0.0),
        ),
    )
    if end.reason == STOP and entry.tokens:
        finished.matched_stop.token_id = entry.tokens[-1]
    return finished
