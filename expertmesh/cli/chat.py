"""`expertmesh chat`: a conversation at the terminal, or the lines of standard input as its turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.answering import answer_json, print_summary, router_for, show_answer, text_of
from expertmesh.cli.fleet_options import DEFAULT_TARGET, FleetOptions
from expertmesh.cli.line_input import LineInput
from expertmesh.cli.terminal import print_json, run
from expertmesh.client import Message, Sampling

PROMPT = "> "


def chat(
    target: Annotated[
        str | None, typer.Option(help=f"HOST:PORT of a running router. Default {DEFAULT_TARGET}.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Start a fleet on this checkpoint for the call.")] = None,
    expert_workers: Annotated[
        int | None, typer.Option(min=0, help="With --model: expert workers. Default 2.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of one answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token. Default 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk to the model of a running router, or of one started for the call (--model).

    Each line is a turn, and the turns before it go along. On a terminal an empty line or Ctrl-D ends the
    conversation; elsewhere standard input is read to its end, and empty lines are passed over.
    """
    options = FleetOptions(model=model, expert_workers=expert_workers, port=0)
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    messages = [Message("system", system)] if system else []
    raise typer.Exit(run(_talk(target, options, messages, sampling, as_json=json)))


async def _talk(
    target: str | None, options: FleetOptions, messages: list[Message], sampling: Sampling, *, as_json: bool
) -> None:
    lines = LineInput(sys.stdin.fileno())
    async with router_for(target, options) as client:
        while (line := await _next_turn(lines)) is not None:
            messages.append(Message("user", line))
            events = await show_answer(client, messages, sampling, as_json=as_json)
            messages.append(Message("assistant", text_of(events)))
            if as_json:
                print_json(answer_json(events))
            print_summary(events)


async def _next_turn(lines: LineInput) -> str | None:
    """What the user says next; None at the end of the conversation."""
    is_person = sys.stdin.isatty()
    if is_person:
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    while (line := await lines.line()) is not None:
        if line.strip():
            return line
        if is_person:
            return None
    return None
