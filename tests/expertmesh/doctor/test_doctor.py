"""`expertmesh doctor` on this machine: as it is, and with everything wrong that can be made wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.common.test_rank_table import table

ROOT = Path(__file__).resolve().parents[3]
W8A8 = ROOT / "examples/demo_model_w8a8"
DEADLINE_S = 200.0
"""Importing torch takes 3 s on an idle machine; the child has 120 s."""
# What the machine that runs the tests may have set is no part of them.
IGNORED = ("HCCL_", "NCCL_", "ASCEND_", "EXPERTMESH_", "TORCH_", "RANK_TABLE_FILE", "CUDA_VISIBLE_DEVICES")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux names interfaces and owners")


def doctor(*arguments: str | Path, **variables: str) -> tuple[int, list[dict[str, str]]]:
    """Run it; return its exit status and findings."""
    result = run(*arguments, "--json", **variables)
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0)
    return result.returncode, report["findings"]


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(IGNORED)}
    return subprocess.run(
        [sys.executable, "-m", "expertmesh", "doctor", *map(str, arguments)],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def about(subject: str, findings: list[dict[str, str]], outcome: str = "failure") -> dict[str, str]:
    """The one finding of a subject with an outcome."""
    [one] = [one for one in findings if (one["subject"], one["outcome"]) == (subject, outcome)]
    return one


def write(file: Path, document: Any) -> Path:
    file.write_text(json.dumps(document))
    file.chmod(0o640)
    return file


def program(folder: Path, name: str, output: str, status: int = 0) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    file.chmod(0o755)


def with_programs(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process has."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def test_this_machine_can_serve_the_demo_model(tmp_path: Path) -> None:
    port, admin, fleet = free_ports(3)
    ports = {"port": port, "managementPort": admin}
    file = write(tmp_path / "c.json", {"ServerConfig": ports, "ExpertMesh": {"fleetPort": fleet}})
    status, findings = doctor("--config", file)
    assert [one for one in findings if one["outcome"] == "failure"] == []
    assert status == 0
    assert about("python", findings, "ok")["found"].startswith("Python 3.")
    assert "torch 2." in about("torch", findings, "ok")["found"]
    assert "gloo" in about("data plane", findings, "ok")["found"]
    assert "demo_model is complete: 273 tensors in 1 file" in about("model", findings, "ok")["found"]
    assert about("ports", findings, "ok")["found"].startswith("free: ")
    assert about("fleet token", findings, "not applicable")["found"].startswith("none is set")


@linux_only
def test_everything_that_is_wrong_is_found_at_once(tmp_path: Path, taken: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(W8A8, model)
    [shard] = model.glob("*.safetensors")
    shard.unlink()
    config = write(
        tmp_path / "config.json",
        {
            "ServerConfig": {"port": taken, "managementPort": 0},
            "ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": str(model), "worldSize": 7}]},
            "ExpertMesh": {"fleetPort": 0, "dataAddress": "192.0.2.77"},
        },
    )
    broken = table()
    broken["server_list"][1]["device"][0]["rank_id"] = "0"
    token = write(tmp_path / "token", "0123456789abcdef0123")
    token.chmod(0o644)
    status, findings = doctor(
        *("--config", config),
        HCCL_BUFFSIZE="200MB",
        OMP_NUM_THREADS="many",
        RANK_TABLE_FILE=str(write(tmp_path / "ranks.json", broken)),
        EXPERTMESH_FLEET_TOKEN_FILE=str(token),
    )
    assert status == 1
    ports = about("ports", findings)
    assert ports["found"] == (
        f"ServerConfig.port: 127.0.0.1:{taken} is taken by {ports['found'].partition('taken by ')[2]}"
    )
    assert f"(pid {os.getpid()})" in ports["found"]
    assert ports["symptom"] == f"cannot listen on 127.0.0.1:{taken}: Address already in use"
    rank_table = about("rank table", findings)
    assert 'server_list[1].device[0].rank_id is "0", but every rank from 0 to 3' in rank_table["found"]
    models = [one["found"] for one in findings if (one["subject"], one["outcome"]) == ("model", "failure")]
    assert models[0].startswith(f"{shard} is missing, but")
    fleet = about("before weights", findings)
    assert "moe_ep is 7, but a divisor of the checkpoint's n_routed_experts" in fleet["found"]
    variables = [one for one in findings if one["subject"] == "variables"]
    assert {(one["outcome"], one["found"].split(" ")[0]) for one in variables} == {
        ("warning", "HCCL_BUFFSIZE"),
        ("failure", "OMP_NUM_THREADS"),
    }
    assert about("fleet token", findings, "warning")["found"].startswith(f"{token} has mode 644")
    addresses = [one for one in findings if (one["subject"], one["outcome"]) == ("addresses", "failure")]
    assert {one["found"].split(" ")[0] for one in addresses} == {
        "ExpertMesh.dataAddress",
        "ExpertMesh.fleetAddress",
    }
    assert "Cannot assign requested address" in about("data plane", findings)["found"]


def test_a_router_that_is_not_there_refuses_and_the_table_says_what_to_do() -> None:
    [port] = free_ports(1)
    result = run("--router", f"127.0.0.1:{port}", EXPERTMESH_FLEET_TOKEN="x" * 32)
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    [index] = [number for number, line in enumerate(lines) if line.startswith("FAILURE")]
    assert lines[index].split()[1:3] == ["router", f"127.0.0.1:{port}"]
    assert lines[index + 1].split()[:4] == ["what", "you", "would", "see:"]
    assert lines[index + 2].split()[:3] == ["what", "to", "do:"]
    assert lines[-1].endswith(" not applicable")
    assert ", 1 failure, " in lines[-1]


@linux_only
def test_two_servers_back_to_back_are_found_by_their_cables(tmp_path: Path) -> None:
    program(tmp_path, "hccn_tool", "System Description TLV\n\tAscendNPU\n")
    ranks = table()
    ranks["server_list"][0]["server_id"] = ranks["server_list"][0]["container_ip"] = "127.0.0.1"
    config = write(
        tmp_path / "config.json",
        {"ModelDeployConfig": {"ModelConfig": [{"models": {"deepseekv2": {"ep_level": 2}}}]}},
    )
    status, findings = doctor(
        *("--config", config),
        PATH=with_programs(tmp_path),
        RANK_TABLE_FILE=str(write(tmp_path / "ranks.json", ranks)),
    )
    assert status == 1
    found = about("two servers", findings)["found"]
    assert "device 0 of 127.0.0.1 is connected to another NPU: its neighbour describes itself as" in found
    assert "the rank table has 2 servers, but ExpertMesh.dataAddress" in about("addresses", findings)["found"]


def test_an_npu_is_looked_for_where_it_shall_compute(tmp_path: Path) -> None:
    program(tmp_path, "npu-smi", "| npu-smi 25.2.0  Version: 25.2.0 |")
    cann = tmp_path / "cann"
    cann.mkdir()
    for library in ("libascendcl.so", "libhccl.so"):
        (cann / library).touch()
    status, findings = doctor(
        *("--device", "npu"),
        PATH=with_programs(tmp_path),
        ASCEND_HOME_PATH=str(cann),
        LD_LIBRARY_PATH=str(cann),
        HCCL_BUFFSIZE="200MB",
    )
    assert status == 1
    assert about("ascend driver", findings, "ok")["found"].startswith("npu-smi answers")
    assert about("cann", findings, "ok")["found"].startswith(f"CANN in {cann}")
    assert about("npu", findings)["symptom"].startswith("device 'npu' is not available on this machine")
    assert about("variables", findings)["found"].startswith('HCCL_BUFFSIZE is "200MB"')


@pytest.mark.parametrize(
    ("is_super_node", "sentence"),
    [
        (False, "on A2 is HcclAlltoAllV; npu_attention_to_ffn cannot be used, because it is for Atlas A3"),
        (True, "on A3 is HcclAlltoAllV; npu_attention_to_ffn cannot be used, because hidden_size 192 is not"),
    ],
)
def test_what_carries_rows_between_npus_is_said_with_the_reason(
    is_super_node: bool, sentence: str, tmp_path: Path
) -> None:
    ranks = table()
    if is_super_node:
        ranks["server_list"][0]["device"][0]["super_device_id"] = "0"
    config = write(
        tmp_path / "config.json",
        {"ModelDeployConfig": {"ModelConfig": [{"models": {"deepseekv2": {"ep_level": 2}}}]}},
    )
    _, findings = doctor(
        *("--device", "npu", "--config", config),
        RANK_TABLE_FILE=str(write(tmp_path / "ranks.json", ranks)),
    )
    [found] = [one["found"] for one in findings if "carries rows" in one["found"]]
    assert found.startswith(f"what carries rows at ep_level 2 {sentence}")
    assert "npu_moe_distribute_dispatch_v2 cannot be used, because" in found


def test_a_driver_that_answers_without_a_torch_for_it_is_named(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "NVIDIA H100 80GB HBM3, 580.95.05, 81559 MiB")
    status, findings = doctor("--device", "cuda", PATH=with_programs(tmp_path))
    assert status == 1
    assert about("nvidia", findings, "ok")["found"] == "GPUs: NVIDIA H100 80GB HBM3, 580.95.05, 81559 MiB"
    assert about("cuda", findings)["symptom"].startswith("device 'cuda' is not available on this machine")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--router", "nonsense"], '"nonsense" is no address of a service'),
        (["--config", "no/such/file.json"], "no/such/file.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(arguments: list[str], named: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
