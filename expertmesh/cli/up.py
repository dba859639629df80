"""`expertmesh up`: one router and N expert workers on this machine, until Ctrl-C."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from expertmesh.cli.fleet_options import FleetOptions
from expertmesh.cli.loading import loading
from expertmesh.cli.terminal import run
from expertmesh.fleet import Fleet


def up(  # noqa: PLR0913, PLR0917 - one per flag
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default in a source checkout: the demo model."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file in MindIE's layout.")] = None,
    expert_workers: Annotated[
        int | None,
        typer.Option(min=0, help="How many; 0 keeps the experts in the router's process. Default 2."),
    ] = None,
    ep_level: Annotated[
        int | None, typer.Option(min=1, max=2, help="1 AllGather, 2 AllToAll. Default 1.")
    ] = None,
    redundant_experts: Annotated[int | None, typer.Option(min=0, help="Further copies of experts.")] = None,
    device: Annotated[
        Literal["cpu", "cuda", "npu"] | None, typer.Option(help="What computes. Default cpu.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, typer.Option(help="auto: what the checkpoint says.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC; 0 frees every port that is not given.")
    ] = None,
    admin_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Admin service.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP gateway.")] = None,
) -> None:
    """Start a router and expert workers on this machine and serve until Ctrl-C or SIGTERM."""
    options = FleetOptions(
        model=model,
        config=config,
        expert_workers=expert_workers,
        ep_level=ep_level,
        redundant_experts=redundant_experts,
        device=device,
        dtype=dtype,
        port=port,
        admin_port=admin_port,
        http_port=http_port,
    )
    # A signal is how this command is meant to end: exit status 0.
    run(_serve(options))


async def _serve(options: FleetOptions) -> None:
    async with Fleet(options.settings(), show_line) as fleet:
        addresses = await fleet.start()
        async with loading(addresses.admin):
            addresses = await fleet.wait_ready()
        print(addresses.ready_line(), flush=True)
        await fleet.serve()


def show_line(service: str, line: str) -> None:
    """Pass on a line that a service logged."""
    # sys.stderr is looked up anew for each line: the loading bars stand in for it for a while.
    sys.stderr.write(f"{service} | {line}\n")
    sys.stderr.flush()
