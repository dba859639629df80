"""`expertmesh status`: one snapshot of a router and its fleet."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertmesh.admin_client import AdminClient
from expertmesh.cli.fleet_options import DEFAULT_ADMIN
from expertmesh.cli.terminal import output, plain, print_json, run
from protos import admin_pb2

COLUMNS = (
    "rank",
    "worker",
    "state",
    "device",
    "experts",
    "loaded",
    "heartbeat",
    "receive",
    "compute",
    "reply",
)


def status(
    admin: Annotated[str, typer.Option(help="HOST:PORT of the router's admin service.")] = DEFAULT_ADMIN,
    json: Annotated[bool, typer.Option("--json", help="Print the snapshot as one JSON object.")] = False,
) -> None:
    """Show the state of a router and its expert workers."""
    raise typer.Exit(run(_show(admin, as_json=json)))


async def _show(admin: str, *, as_json: bool) -> None:
    async with AdminClient(admin) as client:
        snapshot = await client.status()
    if as_json:
        print_json(plain(snapshot))
    else:
        print_snapshot(snapshot, output())


def print_snapshot(snapshot: admin_pb2.GetStatusResponse, console: Console) -> None:
    """Print a snapshot for a person."""
    state = "[green]ready[/]" if snapshot.ready else "[yellow]not ready[/]"
    reason = f": {escape(snapshot.not_ready_reason)}" if snapshot.not_ready_reason else ""
    console.print(f"{escape(snapshot.model_name or 'no model')} is {state}{reason}")
    console.print(
        f"epoch {snapshot.epoch}, ep_level {snapshot.ep_level}, config version {snapshot.config_version}, "
        f"engine {snapshot.engine_state or 'unknown'} after {snapshot.num_steps} steps"
    )
    console.print(
        f"{snapshot.num_requests_running} requests running, {snapshot.num_requests_waiting} waiting; "
        f"{snapshot.kv_blocks_used} of {snapshot.kv_blocks_total} KV blocks in use"
    )
    if snapshot.recoveries:
        console.print(
            f"{snapshot.recoveries} losses survived, the last in {snapshot.recovery_seconds:.2f} s; "
            f"{snapshot.replayed_steps_total} steps computed again"
        )
    if snapshot.workers:
        console.print(_workers_table(snapshot))
    for warning in snapshot.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def _workers_table(snapshot: admin_pb2.GetStatusResponse) -> Table:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for worker in snapshot.workers:
        times = worker.last_step
        table.add_row(
            str(worker.ep_rank) if worker.ep_rank >= 0 else "-",
            worker.worker_id,
            worker.state,
            worker.device,
            str(worker.num_local_experts),
            f"{worker.loaded_bytes / 1e6:.0f} MB",
            f"{worker.last_heartbeat_s:.1f} s ago",
            *(f"{seconds * 1e3:.2f} ms" for seconds in (times.receive_s, times.compute_s, times.reply_s)),
        )
    return table
