"""`expertmesh config`: `check` looks at a file without any service, the others talk to a running router."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from json import dumps, loads
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from common.config import Effective, resolve
from common.config_problems import json_line
from common.errors import CheckpointError, ConfigError
from common.json_file import read_json, shown_path
from common.preflight import Finding, require
from expertmesh.admin_client import AdminClient
from expertmesh.cli.fleet_options import DEFAULT_ADMIN
from expertmesh.cli.terminal import BAD_INPUT, output, plain, print_json, run
from expertmesh.preflight import alone_here, everywhere
from protos import admin_pb2

WIDTH = 44
"""Columns for a field and its value; longer ones push the rest of their line to the right."""
HASH_LETTERS = 12

config = typer.Typer(
    name="config",
    help="Look at the configuration, and change that of a running router.",
    no_args_is_help=True,
)
Admin = Annotated[str, typer.Option(help="HOST:PORT of the router's admin service.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
File = Annotated[Path, typer.Argument(help="Configuration file in MindIE's layout.")]
ExpectVersion = Annotated[
    int | None, typer.Option(min=1, help="Refuse where another version is in force meanwhile.")
]


@config.callback()
def _group() -> None:
    """Look at the configuration, and change that of a running router."""


@config.command()
def check(
    file: File,
    json: Json = False,
) -> None:
    """Check FILE, offline: show what is in effect, where it came from, and what has no effect."""
    try:
        effective = resolve(file)
        findings: list[Finding] = []
        warnings = [*effective.config.warnings, *_check_checkpoint(file, effective, findings)]
    except ConfigError as error:
        for problem in error.problems:
            print(f"expertmesh: {problem}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None
    if json:
        print_json(_as_json(effective, findings, warnings))
    else:
        _print_lines(effective, findings, warnings)


@config.command()
def show(admin: Admin = DEFAULT_ADMIN, json: Json = False) -> None:
    """Print the document in force: it can be edited and applied again."""
    raise typer.Exit(run(_show(admin, as_json=json)))


@config.command()
def diff(file: File, admin: Admin = DEFAULT_ADMIN, json: Json = False) -> None:
    """Say what FILE would change, and what of it needs another start; nothing changes."""
    raise typer.Exit(run(_apply(file, admin, dry_run=True, expect_version=None, as_json=json)))


@config.command()
def apply(
    file: File,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Fail as it would, and change nothing.")] = False,
    expect_version: ExpectVersion = None,
    admin: Admin = DEFAULT_ADMIN,
    json: Json = False,
) -> None:
    """Put FILE in force between two steps: all of it, or nothing. The router's own file stays as it is."""
    work = _apply(file, admin, dry_run=dry_run, expect_version=expect_version, as_json=json, must_apply=True)
    raise typer.Exit(run(work))


@config.command()
def history(admin: Admin = DEFAULT_ADMIN, json: Json = False) -> None:
    """List the versions that are kept, newest first."""
    raise typer.Exit(run(_history(admin, as_json=json)))


@config.command()
def rollback(
    version: Annotated[int, typer.Argument(min=1, help="A version of `config history`.")],
    expect_version: ExpectVersion = None,
    admin: Admin = DEFAULT_ADMIN,
    json: Json = False,
) -> None:
    """Put the document of VERSION in force again, as a new version."""
    raise typer.Exit(run(_roll_back(version, admin, expect_version=expect_version, as_json=json)))


async def _show(admin: str, *, as_json: bool) -> None:
    async with AdminClient(admin) as client:
        found = await client.config()
    if as_json:
        document, effective = loads(found.config_json), loads(found.effective_json)
        print_json(plain(found) | {"config_json": document, "effective_json": effective})
        return
    print(found.config_json)
    kept = f"versions are kept in {found.state_dir}" if found.state_dir else "versions end with the router"
    print(f"expertmesh: version {found.version}; {kept}", file=sys.stderr)


async def _apply(
    file: Path,
    admin: str,
    *,
    dry_run: bool,
    expect_version: int | None,
    as_json: bool,
    must_apply: bool = False,
) -> None:
    # Read here, so that a sentence about a file that is no JSON names it.
    document = dumps(read_json(file))
    async with AdminClient(admin) as client:
        outcome = await client.reload(document, dry_run=dry_run, expected_version=expect_version)
    _print_outcome(outcome, as_json=as_json)
    if must_apply and outcome.refusals:
        raise typer.Exit(BAD_INPUT)


async def _history(admin: str, *, as_json: bool) -> None:
    async with AdminClient(admin) as client:
        versions = await client.versions()
    if as_json:
        print_json([plain(version) for version in versions])
        return
    table = Table("version", "", "since", "author", "origin", "content", box=None, pad_edge=False)
    for one in versions:
        since = datetime.fromtimestamp(one.created_s, UTC).isoformat(" ", "seconds")
        mark = "in force" if one.in_force else ""
        table.add_row(str(one.version), mark, since, one.author, one.origin, one.content_hash[:HASH_LETTERS])
    output().print(table)


async def _roll_back(version: int, admin: str, *, expect_version: int | None, as_json: bool) -> None:
    async with AdminClient(admin) as client:
        outcome = await client.roll_back(version, expected_version=expect_version)
    _print_outcome(outcome, as_json=as_json)


def _print_outcome(
    outcome: admin_pb2.ReloadConfigResponse | admin_pb2.RollbackConfigResponse, *, as_json: bool
) -> None:
    if as_json:
        print_json(plain(outcome))
        return
    for change in outcome.changes:
        old, new = (json_line(loads(text), most=sys.maxsize) for text in (change.old_json, change.new_json))
        print(f"{change.path}: {old} -> {new}  ({change.reload_class})")
    for warning in outcome.warnings:
        print(f"warning: {warning}")
    for refusal in outcome.refusals if isinstance(outcome, admin_pb2.ReloadConfigResponse) else ():
        print(f"refused: {refusal}")
    differences = (
        f"{len(outcome.changes)} {'value differs' if len(outcome.changes) == 1 else 'values differ'}"
    )
    print(f"version {outcome.version} is {'now ' if outcome.applied else ''}in force; {differences}")


def _check_checkpoint(file: Path, effective: Effective, findings: list[Finding]) -> Iterator[str]:
    """Check the configuration against the checkpoint; warn where there is none on this machine.

    What was found is added to `findings`. What this machine lacks is a warning: others may have it.

    Raises:
        ConfigError: no checkpoint that can be served, or it does not fit the configuration.
    """
    path = effective.origins["model_path"].detail
    directory = effective.config.model_path
    if directory is None:
        yield f"{path} is not set, and the services need it: set it, or use `expertmesh up --model`"
    elif not os.path.exists(directory):
        # Not Path.exists, which raises where a part of the path is too long or may not be looked into.
        yield f"{path} is {json_line(directory)}, which does not exist on this machine"
    else:
        try:
            findings += everywhere(effective.config, Path(directory))
            require(findings)
        except CheckpointError as error:
            raise ConfigError(f"{shown_path(file)}: {path} is {json_line(directory)}, but {error}") from None
        except ConfigError as error:
            raise ConfigError(*(f"{shown_path(file)}: {problem}" for problem in error.problems)) from None
        yield from _check_memory(effective, Path(directory), findings)


def _check_memory(effective: Effective, directory: Path, findings: list[Finding]) -> Iterator[str]:
    try:
        found = list(alone_here(effective.config, directory))
    except (CheckpointError, ConfigError) as error:
        yield f"the services could not load: {error}"
        return
    findings += found
    yield from (finding.sentence for finding in found if not finding.is_met)


def _as_json(effective: Effective, findings: list[Finding], warnings: list[str]) -> dict[str, object]:
    return {
        "config": effective.config.model_dump(mode="json", exclude={"warnings"}),
        "origins": {field: asdict(origin) for field, origin in effective.origins.items()},
        "preflight": [asdict(finding) for finding in findings],
        "warnings": warnings,
    }


def _print_lines(effective: Effective, findings: list[Finding], warnings: list[str]) -> None:
    """One line for each field: its name and value as in GetConfig, and where it came from; then checks."""
    values = effective.config.model_dump(mode="json")
    for field, origin in effective.origins.items():
        assignment = f"{field} = {json_line(values[field], most=sys.maxsize)}"
        print(f"{assignment:<{WIDTH}}  {origin.kind:<11}  {origin.detail}")
    for finding in findings:
        if finding.is_met:
            print(f"checked: {finding.sentence}")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"valid, {len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'}")
