"""Compose accepts every file, and only those for accelerators ask for more than a user has."""

from __future__ import annotations

import pytest

from tests.compose.engine import Engine
from tests.compose.machine import MODEL_OF_THE_DOCUMENT
from tests.source import ROOT

pytestmark = pytest.mark.compose
FILES = sorted(path.name for path in (ROOT / "compose").glob("*.yaml"))
ROLE = {"router.yaml": "router", "cpu.yaml": "router"}
PRIVILEGES = ("memlock", "devices:", "privileged", "cap_add", "ipc:", "pid:")


def resolved(engine: Engine, file: str) -> str:
    """The file as compose understands it, with the variables of an example."""
    role = ROLE.get(file, "expert-worker")
    environment = ROOT / "compose" / "env" / f"{role}.env"
    return engine.docker(
        "compose", "--env-file", str(environment), "-f", str(ROOT / "compose" / file), "config"
    )


@pytest.mark.parametrize("file", FILES)
def test_compose_accepts_the_file_with_the_example_of_its_variables(engine: Engine, file: str) -> None:
    text = resolved(engine, file)
    assert MODEL_OF_THE_DOCUMENT in text
    assert "stop_grace_period" in text
    assert "healthcheck" in text


@pytest.mark.parametrize("file", FILES)
def test_only_files_for_accelerators_ask_for_privileges(engine: Engine, file: str) -> None:
    asked = [word for word in PRIVILEGES if word in resolved(engine, file)]
    assert bool(asked) == (file in {"cuda.yaml", "npu.yaml"})
    assert "privileged" not in asked
