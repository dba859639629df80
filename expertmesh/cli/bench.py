"""`expertmesh bench`: measures a fleet that is started for the call."""

from __future__ import annotations

import json as json_module
import tempfile
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ConfigError
from expertmesh.cli.fleet_options import FleetOptions
from expertmesh.cli.loading import loading
from expertmesh.cli.terminal import output, print_json, run
from expertmesh.client import Client, Sampling
from expertmesh.fleet import Fleet
from expertmesh.trace_summary import TraceSummary, summarize

bench = typer.Typer(name="bench", help="Measure a fleet that is started for the call.", no_args_is_help=True)

FIRST_ID = 100
"""Special tokens have low ids."""


@bench.command()
def exchange(
    model: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    expert_workers: Annotated[int, typer.Option(min=1, help="How many.")] = 2,
    ep_level: Annotated[int, typer.Option(min=1, max=2, help="1 AllGather, 2 AllToAll.")] = 2,
    micro_batches: Annotated[int, typer.Option(min=1, max=8, help="Parts a step is cut into.")] = 1,
    chunk_rows: Annotated[int, typer.Option(min=0, help="Rows of one message; 0: not cut.")] = 4096,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after it.")] = 16,
    trace: Annotated[Path | None, typer.Option(help="Keep the timeline, as Chrome trace JSON.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Trace one request through router and workers: what takes how long, and what happens side by side."""
    if trace is not None and not trace.resolve().parent.is_dir():
        raise ConfigError(f"{trace} cannot be written: there is no folder {trace.resolve().parent}")
    options = FleetOptions(model=model, expert_workers=expert_workers, ep_level=ep_level, port=0)
    overrides = {"ExpertMesh.microBatches": micro_batches, "ExpertMesh.chunkRows": chunk_rows}
    kept = trace.resolve() if trace is not None else None
    raise typer.Exit(run(_trace(options, overrides, prompt_tokens, max_tokens, kept, as_json=json)))


async def _trace(
    options: FleetOptions,
    overrides: dict[str, Any],
    prompt_tokens: int,
    max_tokens: int,
    kept: Path | None,
    *,
    as_json: bool,
) -> None:
    settings = options.settings()
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        file = kept or Path(folder) / "trace.json"
        settings.overrides.update(overrides | {"ExpertMesh.traceFile": str(file)})
        unread: deque[tuple[str, str]] = deque(maxlen=1)
        async with Fleet(settings, lambda name, line: unread.append((name, line))) as fleet:
            addresses = await fleet.start()
            async with loading(addresses.admin):
                addresses = await fleet.wait_ready()
            async with Client(addresses.grpc) as client:
                vocab_size = (await client.model()).vocab_size
                prompt = [FIRST_ID + i * 7919 % (vocab_size - FIRST_ID) for i in range(prompt_tokens)]
                sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
                await client.answer(prompt, sampling)
        # The engine writes the trace when it ends.
        summary = summarize(json_module.loads(file.read_bytes()))
    if as_json:
        print_json(summary.json())
    else:
        _print(summary, kept)


def _print(summary: TraceSummary, kept: Path | None) -> None:
    console = output()
    for name in sorted(summary.medians_us):
        median, count = summary.medians_us[name], summary.counts[name]
        console.print(f"{name:<16} {median:10.0f} us median of {count}", markup=False)
    console.print(f"the router waited {summary.waiting_us / 1000:.1f} ms for rows", markup=False)
    console.print(
        f"workers computed {summary.experts_us / 1000:.1f} ms, {summary.overlap:.0%} of it while the router "
        "computed too",
        markup=False,
    )
    console.print(
        f"{summary.arrived_meanwhile:.0%} of the messages arrived while their worker computed others",
        markup=False,
    )
    if kept is not None:
        console.print(f"{kept}: open it in a trace viewer (Perfetto, chrome://tracing)", markup=False)
