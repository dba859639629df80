"""`expertmesh doctor`: looks at this machine before a start, and says what to do about what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from common.config import Config, resolve
from common.config_file import read_document
from common.errors import ConfigError
from common.json_file import shown_path
from expertmesh.cli.terminal import FAILED, output, print_json
from expertmesh.demo_model import demo_model
from expertmesh.doctor.checks import examine
from expertmesh.doctor.facts.environment import gather_environment
from expertmesh.doctor.facts.machine import gather_machine
from expertmesh.doctor.finding import Finding, Outcome
from expertmesh.doctor.setup import Setup, split_address

DEVICES = ("cpu", "cuda", "npu")
DEVICE_VARIABLE = "EXPERTMESH_DEVICE"
MARKS = {
    Outcome.OK: "[green]ok     [/]",
    Outcome.WARNING: "[yellow]warning[/]",
    Outcome.FAILURE: "[red]FAILURE[/]",
    Outcome.NOT_APPLICABLE: "[dim]-      [/]",
}
WIDTH = 14
INDENT = " " * (WIDTH + 9)


def doctor(
    config: Annotated[Path | None, typer.Option(help="Configuration file in MindIE's layout.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default: the configuration's, else the demo model."),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda", "npu"] | None, typer.Option(help="What shall compute. Default: as configured.")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a router's fleet port: look at this machine as one for its workers."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Look at this machine before a start; exit with 1 where something would fail."""
    if router is not None:
        split_address(router)
    setup = read_setup(config, model, device, router)
    findings = examine(setup, gather_machine(setup))
    has_failed = any(finding.outcome is Outcome.FAILURE for finding in findings)
    if json:
        print_json({"ok": not has_failed, "findings": [_plain(finding) for finding in findings]})
    else:
        print_findings(findings, output())
    raise typer.Exit(FAILED if has_failed else 0)


def read_setup(file: Path | None, model: Path | None, device: str | None, router: str | None) -> Setup:
    """Read the configuration as the services would; what is wrong with it is a finding, not an end.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    document = {} if file is None else read_document(file)
    overrides = {
        "ModelConfig.modelWeightPath": None if model is None else str(model.resolve()),
        "ExpertMesh.device": device,
        "ExpertMesh.router": router,
    }
    environment = gather_environment()
    config: Config | None = None
    problems: tuple[str, ...] = ()
    try:
        config = resolve(file, {key: value for key, value in overrides.items() if value is not None}).config
    except ConfigError as error:
        problems = error.problems
    source = "the default configuration" if file is None else shown_path(file)
    named = model if config is None or config.model_path is None else Path(config.model_path)
    return Setup(
        config=config,
        source=source,
        problems=problems,
        device=device or (config.device if config is not None else _device(document, environment)),
        model=named or (demo_model() if config is not None and router is None else None),
        router=router or (config.router if config is not None else None),
        environment=environment,
    )


def _device(document: dict[str, Any], environment: dict[str, str]) -> str:
    """The device of a configuration that cannot be read as a whole."""
    own = document.get("ExpertMesh")
    named = environment.get(DEVICE_VARIABLE) or (own.get("device") if isinstance(own, dict) else None)
    return named if named in DEVICES else "cpu"


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings for a person: a line each, and below what needs it, the symptom and the remedy."""
    for one in findings:
        console.print(f"{MARKS[one.outcome]} {escape(one.subject):<{WIDTH}} {escape(one.found)}")
        if one.symptom:
            console.print(f"{INDENT}[dim]what you would see:[/] {escape(one.symptom)}")
        if one.remedy:
            console.print(f"{INDENT}[dim]what to do:[/]         {escape(one.remedy)}")
    counts = Counter(one.outcome for one in findings)
    console.print(", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome))


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "outcome": finding.outcome.value,
        "subject": finding.subject,
        "found": finding.found,
        "symptom": finding.symptom,
        "remedy": finding.remedy,
    }
