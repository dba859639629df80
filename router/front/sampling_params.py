"""A GenerateRequest as the engine takes it: every field checked, what is not supported refused by name."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from common.errors import RequestError
from protos import generation_pb2 as pb
from router.messages import Submit

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_REQUEST_ID = 128
SEED_BITS = 63
MAX_TEMPERATURE = 1000.0

PROMPT_FIELDS = {"text": "text", "token_ids": "token_ids.ids", "chat": "chat.messages"}
"""What is named when a prompt is too long, by how it was given."""

# Fields that have no effect yet: the value that asks for nothing.
NEUTRAL: dict[str, float | bool] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "n": 1,
    "include_stop": False,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit into.

    Attributes:
        max_seq_len: tokens of prompt and answer.
        max_prompt_len: tokens of the prompt.
        max_new_tokens: tokens of the answer; None where only max_seq_len bounds it.
        truncation: 0 refuses prompts that are too long, -1 cuts them on the right, 1 on the left.
    """

    vocab_size: int
    max_seq_len: int
    max_prompt_len: int
    max_new_tokens: int | None
    truncation: int
    eos_token_ids: tuple[int, ...]


def check_supported(request: pb.GenerateRequest) -> None:
    """Refuse what would be ignored.

    Raises:
        RequestError: naming the field.
    """
    if len(request.request_id) > MAX_REQUEST_ID or not request.request_id.isprintable():
        raise RequestError(
            "request_id", f"request_id must be at most {MAX_REQUEST_ID} printable characters, or empty"
        )
    if request.WhichOneof("prompt") is None:
        raise RequestError("prompt", "no prompt is set: set text, token_ids or chat")
    if request.priority != 0:
        raise RequestError("priority", f"priority is {request.priority}, but only 0 is supported yet")
    sampling = request.sampling
    for name, neutral in NEUTRAL.items():
        if sampling.HasField(name) and getattr(sampling, name) != neutral:  # type: ignore[arg-type]
            raise _unsupported(name, f"is {getattr(sampling, name)}; leave it at {neutral}")
    if sampling.logit_bias:
        raise _unsupported("logit_bias", "is set; leave it out")
    if sampling.stop:
        raise _unsupported("stop", "is set; use stop_token_ids")
    if sampling.HasField("prompt_logprobs"):
        raise _unsupported("prompt_logprobs", "is set; leave it out")


def submit_from(request: pb.GenerateRequest, request_id: str, prompt: list[int], limits: Limits) -> Submit:
    """Check the sampling fields and the prompt against the limits.

    Raises:
        RequestError: naming the field, the value and the rule.
    """
    prompt = _fitting(prompt, PROMPT_FIELDS[request.WhichOneof("prompt") or "text"], limits)
    sampling = request.sampling
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise _wrong("temperature", temperature, f"must be between 0 and {MAX_TEMPERATURE:g}")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if math.isnan(top_p) or not 0 < top_p <= 1:
        raise _wrong("top_p", top_p, "must be above 0 and at most 1")
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise _wrong("logprobs", sampling.logprobs, f"must be at most {MAX_LOGPROBS}")
    return Submit(
        request_id=request_id,
        prompt=prompt,
        temperature=temperature,
        top_k=min(sampling.top_k, limits.vocab_size),
        top_p=top_p,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(SEED_BITS),
        max_tokens=_max_tokens(sampling, len(prompt), limits),
        stop_token_ids=_stop_token_ids(sampling, limits),
        logprobs=min(sampling.logprobs, limits.vocab_size) if sampling.HasField("logprobs") else None,
    )


def check_ids(token_ids: list[int], field: str, vocab_size: int) -> None:
    """Check that every id is one of the model's.

    Raises:
        RequestError: naming the first that is not.
    """
    # max() over a list of ints is far quicker than a generator over a long prompt.
    if token_ids and max(token_ids) >= vocab_size:
        index, token = next((i, t) for i, t in enumerate(token_ids) if t >= vocab_size)
        raise RequestError(
            f"{field}[{index}]",
            f"token id {token} at position {index} is not below vocab_size ({vocab_size})",
        )


def _fitting(prompt: list[int], field: str, limits: Limits) -> list[int]:
    if not prompt:
        raise RequestError(field, "the prompt has no tokens: it needs at least 1")
    if len(prompt) > limits.max_prompt_len:
        if limits.truncation == 0:
            raise RequestError(
                field,
                f"the prompt has {len(prompt)} tokens, but at most {limits.max_prompt_len} are taken here "
                f"(maxInputTokenLen; prompt and answer together at most {limits.max_seq_len}): shorten it",
            )
        kept = limits.max_prompt_len
        prompt = prompt[-kept:] if limits.truncation == 1 else prompt[:kept]
    check_ids(prompt, field, limits.vocab_size)
    return prompt


def _max_tokens(sampling: pb.SamplingParams, prompt_tokens: int, limits: Limits) -> int:
    room = limits.max_seq_len - prompt_tokens
    if limits.max_new_tokens is not None:
        room = min(room, limits.max_new_tokens)
    if not sampling.HasField("max_tokens"):
        return room
    if sampling.max_tokens == 0:
        raise _wrong("max_tokens", 0, "must be at least 1, or unset for as many as fit")
    return min(sampling.max_tokens, room)


def _stop_token_ids(sampling: pb.SamplingParams, limits: Limits) -> list[int]:
    given = list(sampling.stop_token_ids)
    if len(given) > MAX_STOP_TOKEN_IDS:
        raise _wrong("stop_token_ids", f"{len(given)} ids long", f"must hold at most {MAX_STOP_TOKEN_IDS}")
    check_ids(given, "sampling.stop_token_ids", limits.vocab_size)
    model = () if sampling.ignore_eos else limits.eos_token_ids
    return sorted({*given, *model})


def _unsupported(name: str, sentence: str) -> RequestError:
    return RequestError(f"sampling.{name}", f"{name} is not supported yet and {sentence}")


def _wrong(name: str, value: object, rule: str) -> RequestError:
    return RequestError(f"sampling.{name}", f"{name} is {value}, but it {rule}")
