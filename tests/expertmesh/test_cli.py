"""The command line: what the flags mean, and that bad input is one sentence and exit status 2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from expertmesh.cli.fleet_options import FleetOptions
from expertmesh.cli.terminal import plain
from protos import admin_pb2

ROOT = Path(__file__).resolve().parents[2]


def expertmesh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertmesh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def effective(options: FleetOptions, folder: Path) -> Config:
    """What the services make of the flags."""
    return options.settings().write(folder / "effective.json")


def test_two_expert_workers_are_started_when_nobody_says_how_many(tmp_path: Path) -> None:
    config = effective(FleetOptions(model=tmp_path), tmp_path)
    assert (config.world_size, config.experts_in_process) == (2, False)
    assert config.model_path == str(tmp_path)


@pytest.mark.parametrize("is_inside_backend", [False, True])
def test_flags_win_over_the_file_and_the_file_over_defaults(is_inside_backend: bool, tmp_path: Path) -> None:
    model = {"modelName": "m", "modelWeightPath": "/weights", "worldSize": 8, "moe_ep": 8, "moe_tp": 1}
    document: dict[str, Any] = {"ModelDeployConfig": {"maxSeqLen": 100, "ModelConfig": [model]}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"BackendConfig": document} if is_inside_backend else document))
    config = effective(FleetOptions(config=file), tmp_path)
    assert (config.world_size, config.model_name, config.model_path) == (8, "m", "/weights")

    options = FleetOptions(config=file, expert_workers=3, ep_level=2, dtype="float32", port=7000)
    config = effective(options, tmp_path)
    assert (config.world_size, config.moe_ep, config.ep_level) == (3, 3, 2)
    assert (config.dtype, config.port, config.management_port) == ("float32", 7000, 1026)
    assert (config.max_seq_len, config.model_name) == (100, "m")


def test_flags_win_over_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_DTYPE", "bfloat16")
    monkeypatch.setenv("EXPERTMESH_THREADS", "3")
    monkeypatch.setenv("EXPERTMESH_WORLD_SIZE", "5")
    options = FleetOptions(model=tmp_path, dtype="float32", expert_workers=2)
    config = effective(options, tmp_path)
    assert (config.dtype, config.threads, config.world_size) == ("float32", 3, 2)
    # The services read the flags from their environment, which replaces the one they inherit.
    environment = options.settings().environment()
    assert environment == {
        "EXPERTMESH_DTYPE": "float32",
        "EXPERTMESH_EXPERTS_IN_PROCESS": "false",
        "EXPERTMESH_WORLD_SIZE": "2",
    }


@pytest.mark.parametrize("models", [{"deepseekv3": {"ep_level": 1}}, '{"deepseekv3": {"ep_level": 1}}'])
def test_the_ep_level_goes_where_the_file_has_it(models: object, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    model = {"modelWeightPath": "/weights", "models": models}
    file.write_text(json.dumps({"ModelDeployConfig": {"ModelConfig": [model]}}))
    assert effective(FleetOptions(config=file, ep_level=2), tmp_path).ep_level == 2


def test_port_0_frees_every_port_that_is_not_given(tmp_path: Path) -> None:
    config = effective(FleetOptions(model=tmp_path, port=0, admin_port=9000), tmp_path)
    assert (config.port, config.management_port, config.fleet_port) == (0, 9000, 0)


def test_no_expert_workers_means_experts_in_the_routers_process(tmp_path: Path) -> None:
    assert effective(FleetOptions(model=tmp_path, expert_workers=0), tmp_path).experts_in_process


@pytest.mark.parametrize(
    ("name", "expected"), [("DeepSeek-V2-Lite", "DeepSeek-V2-Lite"), ("a b(1)_", "a-b-1")]
)
def test_a_model_is_named_after_its_directory(name: str, expected: str, tmp_path: Path) -> None:
    assert effective(FleetOptions(model=tmp_path / name), tmp_path).model_name == expected


def test_a_source_checkout_serves_the_demo_model_when_nobody_names_one(tmp_path: Path) -> None:
    config = effective(FleetOptions(), tmp_path)
    assert (config.model_path, config.model_name) == (str(ROOT / "examples" / "demo_model"), "demo_model")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": "/weights"}]}}))
    assert effective(FleetOptions(config=file), tmp_path).model_path == "/weights"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what a wheel holds and nothing else."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in packages["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_an_installed_wheel_has_no_demo_model_and_names_the_flag_to_use(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "expertmesh", "up", "--port", "0"]
    result = subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "expertmesh: no checkpoint was given: name its directory with --model DIR\n"


BAD_INPUT = [
    (["up", "--model", "nowhere", "--config", "nowhere.json"], "nowhere.json"),
    (["up", "--model", "nowhere", "--ep-level", "3"], "--ep-level"),
    (["up", "--model", "nowhere", "--http-port", "80"], "httpPort"),
    (["up", "--model", "nowhere", "--device", "npu"], "device"),
    (["up", "--model", "nowhere", "--device", "abacus"], "--device"),
    (["generate", "Hello", "--model", "nowhere", "--target", "localhost:1"], "--target"),
    (["generate", "Hello", "--max-tokens", "0"], "--max-tokens"),
    (["chat", "--model", "nowhere", "--target", "localhost:1"], "--target"),
    (["chat", "--temperature", "-1"], "--temperature"),
    (["status", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT)
def test_bad_input_is_named_on_stderr_with_exit_status_2(arguments: list[str], named: str) -> None:
    result = expertmesh(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_router_that_is_not_there_is_one_sentence_with_exit_status_1() -> None:
    result = expertmesh("status", "--admin", "127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr.startswith("expertmesh: nothing listens on 127.0.0.1:1")
    assert len(result.stderr.splitlines()) == 1


def test_a_proxy_of_the_environment_sees_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("no_grpc_proxy", raising=False)
        result = expertmesh("status", "--admin", "127.0.0.1:1")
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert result.stderr.startswith("expertmesh: nothing listens on 127.0.0.1:1")


def test_a_snapshot_as_json_has_every_field_and_numbers_as_numbers() -> None:
    snapshot = admin_pb2.GetStatusResponse(epoch=2**40)
    snapshot.workers.add(worker_id="worker-0", loaded_bytes=7)
    value = json.loads(json.dumps(plain(snapshot)))
    assert value["epoch"] == 2**40
    assert value["ready"] is False
    assert value["workers"][0]["loaded_bytes"] == 7
    assert set(value["workers"][0]["last_step"]) == {"receive_s", "compute_s", "reply_s"}
