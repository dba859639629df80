"""One engine and one image for all tests with containers, and the answer of one process to compare with."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import Engine, running_engine
from tests.compose.ingredients import build_arguments
from tests.compose.machine import BUILD, PROMPT, SAMPLING, Machine, document
from tests.tiny_checkpoint import write_checkpoint

IMAGE = "expertmesh:tests"
BUILD_S = 600.0


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint that the user of the containers can read."""
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, family="v3", n_routed_experts=24)
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


@pytest.fixture(scope="session")
def built(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the chapter "One machine" was followed up to the image."""
    machine = Machine(
        tmp_path_factory.mktemp("one") / "checkout",
        engine,
        checkpoint,
        IMAGE=IMAGE,
        COMPOSE_PROJECT_NAME="expertmesh-tests-one",
        PORT=free_port(),
        MANAGEMENT_PORT=free_port(),
    )
    machine.export(**build_arguments(engine, machine.directory / "compose" / "wheels"))
    machine.run(document("One machine")[BUILD], BUILD_S)
    yield machine
    engine.docker("image", "rm", "--force", IMAGE)


@pytest.fixture(scope="session")
def expected(built: Machine) -> list[int]:
    """The tokens of one process with all experts in it, in a container of the same image."""
    said = built.engine.docker(
        *("run", "--rm", "--network", "none", "--volume", f"{built.model}:/model:ro", IMAGE),
        *("expertmesh", "generate", PROMPT, "--model", "/model", "--expert-workers", "0", "--json"),
        *("--temperature", "0", "--max-tokens", str(SAMPLING.max_tokens), "--ignore-eos"),
        timeout_s=120,
    )
    return list(json.loads(said)["token_ids"])
