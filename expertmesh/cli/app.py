"""The commands of `expertmesh`, put together."""

from __future__ import annotations

import typer

from expertmesh.cli.bench import bench
from expertmesh.cli.chat import chat
from expertmesh.cli.config import config
from expertmesh.cli.doctor import doctor
from expertmesh.cli.experts import experts
from expertmesh.cli.generate import generate
from expertmesh.cli.status import status
from expertmesh.cli.up import up

app = typer.Typer(
    name="expertmesh",
    help="Serves DeepSeek-V2, V3 and R1 with expert parallelism, split into a router and expert workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(generate)
app.command()(chat)
app.command()(status)
app.command()(experts)
app.command()(doctor)
app.add_typer(config)
app.add_typer(bench)
