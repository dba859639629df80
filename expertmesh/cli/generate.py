"""`expertmesh generate`: streams the answer to one prompt to the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.answering import answer_json, print_summary, router_for, show_answer
from expertmesh.cli.fleet_options import DEFAULT_TARGET, FleetOptions
from expertmesh.cli.terminal import output, print_json, run
from expertmesh.client import Chunk, Logprob, Sampling


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
    options = FleetOptions(model=model, expert_workers=expert_workers, port=0)
    raise typer.Exit(run(_ask(target, options, text, sampling, as_json=json)))


async def _ask(
    target: str | None, options: FleetOptions, text: str, sampling: Sampling, *, as_json: bool
) -> None:
    async with router_for(target, options) as client:
        events = await show_answer(client, text, sampling, as_json=as_json)
        if as_json:
            print_json(answer_json(events))
            return
        entries = [entry for event in events if isinstance(event, Chunk) for entry in event.logprobs]
        if entries:
            _print_logprobs(entries)
        print_summary(events)


def _print_logprobs(entries: list[Logprob]) -> None:
    console = output()
    for entry in entries:
        others = "  ".join(f"{one.text!r} {one.logprob:.3f}" for one in entry.top)
        console.print(f"{entry.token_id:>8} {entry.logprob:9.4f}  {entry.text!r:<20} {others}", markup=False)
