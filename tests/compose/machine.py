"""One machine as its operator sees it: a checkout, a shell, a Docker engine, and docs/deploy.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from common.health import ask
from protos import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.compose.engine import Engine
from tests.source import ROOT

COPIED = ("protos", "common", "router", "expert_worker", "expertmesh", "compose")
FILES = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".dockerignore")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.whl", "fleet-token", "*.pyc", "*.so")
MODEL_OF_THE_DOCUMENT = "/srv/models/DeepSeek-V2-Lite"
BUILD = 0
"""The commands of the chapter "One machine" that make the image."""
PROMPT = "The experts of a mixture"
SAMPLING = generation_pb2.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def document(title: str) -> list[str]:
    """The commands of a chapter of docs/deploy.md, block by block."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    chapter = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", chapter, flags=re.MULTILINE | re.DOTALL)
    assert blocks, f"docs/deploy.md has no commands under {title!r}"
    return blocks


class Machine:
    """A checkout and a shell that remembers what was exported."""

    def __init__(self, directory: Path, engine: Engine, model: Path, **environment: str) -> None:
        self.directory = directory
        self.engine = engine
        self.model = model
        self._environment = {**engine.environment, **environment}
        directory.mkdir()
        for name in COPIED:
            shutil.copytree(ROOT / name, directory / name, ignore=LEFT_OUT)
        for name in FILES:
            shutil.copyfile(ROOT / name, directory / name)

    def run(self, script: str, timeout_s: float = 120.0) -> str:
        """Run commands of the document with this machine's checkpoint; return what they print."""
        script = script.replace(MODEL_OF_THE_DOCUMENT, str(self.model))
        exported = self.directory.parent / f"{self.directory.name}.environment"
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{script}\nenv -0 > '{exported}'"],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
        pairs = (entry.partition("=") for entry in exported.read_text().split("\0") if entry)
        self._environment = {name: value for name, _, value in pairs}
        return result.stdout

    def export(self, **environment: str) -> None:
        """Set variables of the shell."""
        self._environment |= environment

    def address(self, port: str) -> str:
        """HOST:PORT of the port that a variable of the shell names."""
        return f"127.0.0.1:{self._environment[port]}"

    def change(self, file: str, **settings: str) -> None:
        """Change lines NAME=VALUE of a file, as the operator does with an editor."""
        path = self.directory / file
        text = path.read_text().replace(MODEL_OF_THE_DOCUMENT, str(self.model))
        for name, value in settings.items():
            text, count = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert count == 1, f"{file} has no line {name}="
        path.write_text(text)


def answer(address: str) -> list[int]:
    """Stream the answer to PROMPT; return its tokens. Errors are grpc.RpcError."""
    request = generation_pb2.GenerateRequest(text=PROMPT, sampling=SAMPLING)
    tokens: list[int] = []
    with grpc.insecure_channel(address) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        for response in stub.Generate(request, timeout=60):
            tokens.extend(response.chunk.token_ids)
    return tokens


def status(address: str) -> admin_pb2.GetStatusResponse:
    """The router's own account of the fleet."""
    with grpc.insecure_channel(address) as channel:
        return admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5)


def wait_until(claim: Callable[[], object], what: str, deadline_s: float = 120.0) -> None:
    """Poll until the claim holds; what cannot be asked yet does not."""
    end = time.monotonic() + deadline_s
    why: object = None
    while time.monotonic() < end:
        try:
            if claim():
                return
        except (grpc.RpcError, AssertionError) as error:
            why = error
        time.sleep(0.25)
    raise AssertionError(f"not so after {deadline_s:g} s: {what}; {why}")


def serves(address: str) -> bool:
    """Whether the router at `address` is ready for requests."""
    return ask(address, "readiness") == "SERVING"
