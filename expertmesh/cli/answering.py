"""What commands that show answers share: a router to ask, the answer as it comes, how long it took."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from common.errors import ConfigError
from expertmesh.cli.fleet_options import DEFAULT_TARGET, FleetOptions
from expertmesh.cli.loading import loading
from expertmesh.client import Chunk, Client, Event, Finished, Prompt, Sampling, Started
from expertmesh.fleet import Fleet


@contextlib.asynccontextmanager
async def router_for(target: str | None, options: FleetOptions) -> AsyncIterator[Client]:
    """A client of the router at `target`; where a model is named, of a fleet that lives as long as the block.

    Raises:
        ConfigError: both are given.
    """
    if target is not None and options.model is not None:
        raise ConfigError("--target and --model exclude each other: a running router, or one for this call")
    if options.model is None:
        async with Client(target or DEFAULT_TARGET) as client:
            yield client
        return
    # The services' logs would run through the answer; the last of them are in the error when one fails.
    unread: deque[tuple[str, str]] = deque(maxlen=1)
    async with Fleet(options.settings(), lambda name, line: unread.append((name, line))) as fleet:
        addresses = await fleet.start()
        async with loading(addresses.admin):
            addresses = await fleet.wait_ready()
        async with Client(addresses.grpc) as client:
            yield client


async def show_answer(client: Client, prompt: Prompt, sampling: Sampling, *, as_json: bool) -> list[Event]:
    """Ask, and return the whole stream; write the text to stdout as it comes, unless it is wanted as JSON."""
    events: list[Event] = []
    async for event in client.generate(prompt, sampling):
        events.append(event)
        if isinstance(event, Chunk) and not as_json:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return events


def text_of(events: list[Event]) -> str:
    """The answer's text."""
    return "".join(event.text for event in events if isinstance(event, Chunk))


def answer_json(events: list[Event]) -> dict[str, Any]:
    """The whole answer as one JSON object."""
    chunks = [event for event in events if isinstance(event, Chunk)]
    answer: dict[str, Any] = {
        "text": text_of(events),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
    }
    for event in events:
        if isinstance(event, Started | Finished):
            answer |= asdict(event)
    if entries := [asdict(entry) for chunk in chunks for entry in chunk.logprobs]:
        answer["logprobs"] = entries
    return answer


def print_summary(events: list[Event]) -> None:
    """Say on stderr, and only to a person, how long the answer took."""
    finished = next((event for event in events if isinstance(event, Finished)), None)
    if finished is None or not sys.stderr.isatty():
        return
    rest_s = finished.total_s - finished.first_token_s
    speed = f", {(finished.completion_tokens - 1) / rest_s:.1f} tokens/s after it" if rest_s > 0 else ""
    print(
        f"[{finished.completion_tokens} tokens, {finished.finish_reason}; "
        f"first after {finished.first_token_s:.2f} s{speed}]",
        file=sys.stderr,
    )
