"""`expertmesh up` as a parent: its services only say what real ones say, so that it can be hurt cheaply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0

ROUTER = """
import os, pathlib, sys, threading, time
threading.Thread(target=lambda: (os.read(int(sys.argv[-1]), 1), os._exit(0)), daemon=True).start()
pathlib.Path("pids").mkdir(exist_ok=True)
pathlib.Path("pids/router").write_text(str(os.getpid()))
print("listening grpc=127.0.0.1:1 admin=127.0.0.1:2 fleet=127.0.0.1:3", flush=True)
while len(list(pathlib.Path("pids").iterdir())) < 3:
    time.sleep(0.01)
print("ready grpc=127.0.0.1:1 admin=127.0.0.1:2", flush=True)
time.sleep(60)
"""
WORKER = """
import os, pathlib, sys, threading, time
if pathlib.Path("fail").exists():
    print("the shard model.safetensors is missing", file=sys.stderr)
    sys.exit(2)
threading.Thread(target=lambda: (os.read(int(sys.argv[-1]), 1), os._exit(0)), daemon=True).start()
name = sys.argv[sys.argv.index("--worker-id") + 1]
assert sys.argv[sys.argv.index("--router") + 1] == "127.0.0.1:3"
assert len(os.environ["EXPERTMESH_FLEET_TOKEN"]) >= 32
pathlib.Path("pids", name).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `python -m router` and `python -m expert_worker` are the stand-ins."""
    for name, text in (("router", ROUTER), ("expert_worker", WORKER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "__main__.py").write_text(text)
    return tmp_path


@pytest.fixture
def up(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(folder)
    yield process
    process.kill()
    process.communicate()


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "expertmesh", "up", "--model", str(folder), "--port", "0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def services(folder: Path) -> dict[str, psutil.Process]:
    return {path.name: psutil.Process(int(path.read_text())) for path in (folder / "pids").iterdir()}


def wait_until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end, "not true in time"
        time.sleep(0.02)


def test_one_line_says_where_the_fleet_serves(up: subprocess.Popen[str], folder: Path) -> None:
    assert first_line(up) == "ready grpc=127.0.0.1:1 admin=127.0.0.1:2"
    assert set(services(folder)) == {"router", "worker-0", "worker-1"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_fleet_and_that_is_success(
    up: subprocess.Popen[str], folder: Path, how: signal.Signals
) -> None:
    first_line(up)
    running = list(services(folder).values())
    up.send_signal(how)
    assert up.wait(DEADLINE_S) == 0
    assert psutil.wait_procs(running, timeout=5)[1] == []


def test_nothing_outlives_a_fleet_that_is_killed(up: subprocess.Popen[str], folder: Path) -> None:
    first_line(up)
    running = list(services(folder).values())
    up.kill()
    assert psutil.wait_procs(running, timeout=DEADLINE_S)[1] == []


def test_a_worker_that_dies_while_serving_is_started_again(up: subprocess.Popen[str], folder: Path) -> None:
    first_line(up)
    died = services(folder)["worker-1"]
    died.kill()
    wait_until(lambda: (folder / "pids/worker-1").read_text() not in {"", str(died.pid)})
    assert services(folder)["worker-1"].is_running()
    assert up.poll() is None


def test_a_worker_that_cannot_start_ends_the_fleet_with_its_sentence(folder: Path) -> None:
    (folder / "fail").touch()
    process = start(folder)
    output, log = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (2, "")
    assert "exited with 2: the shard model.safetensors is missing" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert not psutil.pid_exists(int((folder / "pids/router").read_text()))


def test_a_router_that_dies_while_serving_ends_the_fleet(up: subprocess.Popen[str], folder: Path) -> None:
    first_line(up)
    running = services(folder)
    running.pop("router").kill()
    _, log = up.communicate(timeout=DEADLINE_S)
    assert up.returncode == 1
    assert log.splitlines()[-1] == "expertmesh: router was ended by SIGKILL without a word"
    assert psutil.wait_procs(list(running.values()), timeout=5)[1] == []
