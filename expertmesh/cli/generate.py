"""`expertmesh generate`: streams the answer to one prompt to the terminal."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ConfigError
from expertmesh.cli.fleet_options import DEFAULT_TARGET, FleetOptions
from expertmesh.cli.loading import loading
from expertmesh.cli.terminal import output, print_json, run
from expertmesh.client import Chunk, Client, Event, Finished, Logprob, Sampling, Started
from expertmesh.fleet import Fleet


def generate(  # noqa: PLR0913, PLR0917 - one per flag
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    target: Annotated[
        str | None, typer.Option(help=f"HOST:PORT of a running router. Default {DEFAULT_TARGET}.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Start a fleet on this checkpoint for the call.")] = None,
    expert_workers: Annotated[
        int | None, typer.Option(min=0, help="With --model: expert workers. Default 2.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to generate.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token. Default 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Keep this many likeliest tokens; 0 is off.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Alternatives per token, in a table.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Stream the answer to PROMPT from a running router, or from one started for the call (--model)."""
    if target is not None and model is not None:
        raise ConfigError("--target and --model exclude each other: a running router, or one for this call")
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos or None,
        logprobs=logprobs,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if model is None:
        raise typer.Exit(run(_ask(target or DEFAULT_TARGET, text, sampling, as_json=json)))
    options = FleetOptions(model=model, expert_workers=expert_workers, port=0)
    raise typer.Exit(run(_ask_new_fleet(options, text, sampling, as_json=json)))


async def _ask_new_fleet(options: FleetOptions, text: str, sampling: Sampling, *, as_json: bool) -> None:
    # The services' logs would run through the answer; the last of them are in the error when one fails.
    unread: deque[tuple[str, str]] = deque(maxlen=1)
    async with Fleet(options.settings(), lambda name, line: unread.append((name, line))) as fleet:
        addresses = await fleet.start()
        async with loading(addresses.admin):
            addresses = await fleet.wait_ready()
        await _ask(addresses.grpc, text, sampling, as_json=as_json)


async def _ask(target: str, text: str, sampling: Sampling, *, as_json: bool) -> None:
    events: list[Event] = []
    async with Client(target) as client:
        async for event in client.generate(text, sampling):
            events.append(event)
            if isinstance(event, Chunk) and not as_json:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    if as_json:
        print_json(_as_json(events))
        return
    sys.stdout.write("\n")
    entries = [entry for event in events if isinstance(event, Chunk) for entry in event.logprobs]
    if entries:
        _print_logprobs(entries)
    _print_summary(events)


def _as_json(events: list[Event]) -> dict[str, Any]:
    """The whole answer as one JSON object."""
    chunks = [event for event in events if isinstance(event, Chunk)]
    answer: dict[str, Any] = {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
    }
    for event in events:
        if isinstance(event, Started | Finished):
            answer |= asdict(event)
    if entries := [asdict(entry) for chunk in chunks for entry in chunk.logprobs]:
        answer["logprobs"] = entries
    return answer


def _print_logprobs(entries: list[Logprob]) -> None:
    console = output()
    for entry in entries:
        others = "  ".join(f"{one.text!r} {one.logprob:.3f}" for one in entry.top)
        console.print(f"{entry.token_id:>8} {entry.logprob:9.4f}  {entry.text!r:<20} {others}", markup=False)


def _print_summary(events: list[Event]) -> None:
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
