"""`expertmesh config`: commands about the configuration. `check` looks at a file without any service."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.config import Effective, check_experts, resolve
from common.config_problems import json_line
from common.errors import CheckpointError, ConfigError
from common.json_file import shown_path
from common.model_config import ModelConfig
from expertmesh.cli.terminal import BAD_INPUT, print_json

WIDTH = 44
"""Columns for a field and its value; longer ones push the rest of their line to the right."""

config = typer.Typer(name="config", help="Look at configuration files.", no_args_is_help=True)


@config.callback()
def _group() -> None:
    """Look at configuration files."""


@config.command()
def check(
    file: Annotated[Path, typer.Argument(help="Configuration file in MindIE's layout.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Check FILE, offline: show what is in effect, where it came from, and what has no effect."""
    try:
        effective = resolve(file)
        warnings = [*effective.config.warnings, *_check_checkpoint(file, effective)]
    except ConfigError as error:
        for problem in error.problems:
            print(f"expertmesh: {problem}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None
    if json:
        print_json(_as_json(effective, warnings))
    else:
        _print_lines(effective, warnings)


def _check_checkpoint(file: Path, effective: Effective) -> Iterator[str]:
    """Check the configuration against the checkpoint; warn where there is none on this machine.

    Raises:
        ConfigError: no checkpoint that can be served, or its experts cannot be dealt out to the workers.
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
            model = ModelConfig.from_directory(Path(directory))
            check_experts(effective.config, model.n_routed_experts)
        except CheckpointError as error:
            raise ConfigError(f"{shown_path(file)}: {path} is {json_line(directory)}, but {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{shown_path(file)}: {error}") from None


def _as_json(effective: Effective, warnings: list[str]) -> dict[str, object]:
    return {
        "config": effective.config.model_dump(mode="json", exclude={"warnings"}),
        "origins": {field: asdict(origin) for field, origin in effective.origins.items()},
        "warnings": warnings,
    }


def _print_lines(effective: Effective, warnings: list[str]) -> None:
    """One line for each field: its name and value as in GetConfig, and where it came from."""
    values = effective.config.model_dump(mode="json")
    for field, origin in effective.origins.items():
        assignment = f"{field} = {json_line(values[field], most=sys.maxsize)}"
        print(f"{assignment:<{WIDTH}}  {origin.kind:<11}  {origin.detail}")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"valid, {len(warnings)} {'warning' if len(warnings) == 1 else 'warnings'}")
