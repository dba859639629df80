"""A Docker engine for the tests: one that runs, or one of their own that leaves the firewall alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S = 30.0
STOP_S = 60.0
# Nothing is routed out of its networks, and its own proxy publishes ports: no rule is added anywhere.
CONSERVATIVE = (
    *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
    *("--bridge=none", "--storage-driver=overlay2"),
)
# Compose v1 is a program of its own; the documents write `docker compose`, which looks for this.
PLUGIN = """#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then
  echo '{"SchemaVersion": "0.1.0", "Vendor": "tests", "Version": "1", "ShortDescription": "compose v1"}'
else
  shift
  exec docker-compose "$@"
fi
"""


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `environment` is what `docker` and `docker compose` need to find it."""

    environment: Mapping[str, str]

    def docker(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run `docker`; return what it printed."""
        result = subprocess.run(
            ["docker", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert result.returncode == 0, f"docker {' '.join(arguments)}: {result.stderr}{result.stdout}"
        return result.stdout.strip()


@contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine with compose; skips, with the reason, where there is none and none can be started."""
    if shutil.which("docker") is None:
        pytest.skip("no `docker` command: install docker.io, docker-compose and mmdebstrap (Debian, Ubuntu)")
    with tempfile.TemporaryDirectory(prefix="expertmesh-engine-", ignore_cleanup_errors=True) as folder:
        here = Path(folder)
        environment = {**os.environ, "DOCKER_CLI_HINTS": "false"}
        daemon = None
        if not answers(environment):
            environment["DOCKER_HOST"] = f"unix://{here}/docker.sock"
            daemon = _start(here, environment)
        try:
            _provide_compose(here, environment)
            _prefer_buildkit(here, environment)
            yield Engine(environment)
        finally:
            if daemon is not None:
                daemon.terminate()
                daemon.wait(STOP_S)


def answers(environment: Mapping[str, str]) -> bool:
    """Whether an engine answers."""
    return _succeeds(environment, "docker", "version")


def _start(here: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    if shutil.which("dockerd") is None:
        pytest.skip("no Docker engine answers, and there is no dockerd to start one: install docker.io")
    if os.geteuid() != 0:
        pytest.skip("no Docker engine answers, and only root can start one")
    log = here / "log"
    places = {"--data-root": "engine", "--exec-root": "exec", "--pidfile": "pid"}
    with log.open("wb") as sink:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--host", environment["DOCKER_HOST"], *CONSERVATIVE),
                *(f"{flag}={here / name}" for flag, name in places.items()),
            ],
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + START_S
    while daemon.poll() is None and time.monotonic() < end:
        if answers(environment):
            return daemon
        time.sleep(0.2)
    daemon.kill()
    daemon.wait()
    last = log.read_text(errors="replace").splitlines()[-3:]
    pytest.skip(f"a Docker engine could not be started here: {' | '.join(last)}")


def _provide_compose(here: Path, environment: dict[str, str]) -> None:
    if _succeeds(environment, "docker", "compose", "version"):
        return
    if shutil.which("docker-compose") is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    plugin = here / "client" / "cli-plugins" / "docker-compose"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(PLUGIN)
    plugin.chmod(0o755)
    environment["DOCKER_CONFIG"] = str(here / "client")


def _prefer_buildkit(here: Path, environment: dict[str, str]) -> None:
    """Put a `docker` with BuildKit first, where one of several has it: its builds take half the time."""
    found = [Path(folder) / "docker" for folder in environment["PATH"].split(os.pathsep)]
    for docker in (one for one in found if os.access(one, os.X_OK)):
        version = subprocess.run([docker, "--version"], capture_output=True, text=True, timeout=30).stdout
        numbers = re.search(r"version (\d+)", version)
        # Up to version 22 it is part of the client, later it is the plugin buildx.
        has_it = numbers is not None and int(numbers[1]) < 23
        if has_it or _succeeds(environment, str(docker), "buildx", "version"):
            (here / "bin").mkdir()
            (here / "bin" / "docker").symlink_to(docker)
            environment["PATH"] = f"{here / 'bin'}{os.pathsep}{environment['PATH']}"
            environment |= {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
            return


def _succeeds(environment: Mapping[str, str], *command: str) -> bool:
    return subprocess.run(command, env=environment, capture_output=True, timeout=30).returncode == 0
