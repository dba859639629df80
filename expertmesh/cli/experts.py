"""`expertmesh experts`: how often each expert was chosen, as a heatmap of layers and experts."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.admin_client import AdminClient
from expertmesh.cli.fleet_options import DEFAULT_ADMIN
from expertmesh.cli.terminal import output, plain, print_json, run
from expertmesh.heatmap import imbalance, shades

WIDTH = 96


def experts(
    admin: Annotated[str, typer.Option(help="HOST:PORT of the router's admin service.")] = DEFAULT_ADMIN,
    json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Show how often each routed expert was chosen since the router's engine started."""
    raise typer.Exit(run(_show(admin, as_json=json)))


async def _show(admin: str, *, as_json: bool) -> None:
    async with AdminClient(admin) as client:
        loads = await client.expert_load()
    if as_json:
        print_json(plain(loads))
        return
    console = output()
    for layer in loads.layers:
        counts = list(layer.tokens)
        console.print(
            f"layer {layer.layer_id:>3} |{shades(counts, WIDTH)}| {sum(counts)} choices, "
            f"max/mean {imbalance(counts):.2f}",
            markup=False,
        )
