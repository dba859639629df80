"""Whatever is wrong with what a user gives: one sentence that names it, a status, and no process left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from protos import generation_pb2
from tests.e2e.fleet import command, fleet_of, generate

TIMEOUT_S = 60.0
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
ATTENTION = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
TOKEN_VARIABLE = "EXPERTMESH_FLEET_TOKEN"
STARTED_BY = "STARTED_BY_TEST"


def remove_a_shard(model: Path) -> str:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def truncate_a_shard(model: Path) -> str:
    shard = sorted(model.glob("model-*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 100)
    return f"{shard.name} is truncated"


def reshape(model: Path, name: str) -> str:
    for shard in model.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = torch.zeros(3, 5)
            save_file(tensors, shard)
    return f"{name} has shape [3, 5]"


def rename_the_model(model: Path) -> str:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llama"}))
    return "llama"


def claim_more_layers(model: Path) -> str:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 6}))
    return "lacks model.layers.4"


DAMAGES: list[Callable[[Path], str]] = [
    remove_a_shard,
    truncate_a_shard,
    lambda model: reshape(model, ATTENTION),
    lambda model: reshape(model, EXPERT),
    rename_the_model,
    claim_more_layers,
]
NAMES = ["missing shard", "truncated shard", "attention shape", "expert shape", "other model", "more layers"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command to its end, and nothing it started lives on."""
    others = set(psutil.Process().children(recursive=True))
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment}
    )
    started = set(psutil.Process().children(recursive=True)) - others
    assert not started
    assert "Traceback" not in done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.e2e
@pytest.mark.parametrize("damage", DAMAGES, ids=NAMES)
def test_a_damaged_checkpoint_ends_up_with_a_sentence_that_names_the_damage(
    v3_model: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(v3_model, model)
    named = damage(model)
    flags = ("--model", str(model), "--port", "0", "--expert-workers", "2")
    done = run(*command("up", *flags), **{STARTED_BY: str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert named in last_line(done)
    assert done.stdout == ""
    assert not [one for one in psutil.process_iter() if was_started_by(one, str(tmp_path))]


def was_started_by(process: psutil.Process, test: str) -> bool:
    """Whether a process has inherited a test's mark, whoever its parent is now."""
    try:
        return process.environ().get(STARTED_BY) == test
    except psutil.Error:
        return False


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"ServerConfig": {"httpsEnabled": True}}, "ServerConfig.httpsEnabled is true"),
        ({"ExpertMesh": {"dataAddres": "127.0.0.1"}}, "ExpertMesh.dataAddres"),
        ({"ModelDeployConfig": {"ModelConfig": [{"moe_ep": 5, "worldSize": 5}]}}, "moe_ep is 5"),
    ],
)
def test_a_wrong_configuration_ends_up_with_its_path_and_value(
    v3_model: Path, tmp_path: Path, document: dict[str, object], named: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    done = run(*command("up", "--model", str(v3_model), "--config", str(file), "--port", "0"))
    assert done.returncode == 2, done.stderr
    assert named in last_line(done)


def worker_command(tmp_path: Path, router: str, **own: object) -> list[str]:
    file = tmp_path / "worker.json"
    file.write_text(json.dumps({"ExpertMesh": {"registerTimeoutSeconds": 2, **own}}))
    return [sys.executable, "-m", "expert_worker", "--config", str(file), "--router", router]


@pytest.mark.e2e
def test_a_worker_that_cannot_reach_its_router_gives_up_and_says_so(tmp_path: Path) -> None:
    done = run(*worker_command(tmp_path, "127.0.0.1:9"), **{TOKEN_VARIABLE: "t"})
    assert done.returncode == 1
    for part in ("127.0.0.1:9", "within 2 s", "registerTimeoutSeconds"):
        assert part in last_line(done)


@pytest.mark.e2e
def test_a_worker_with_the_wrong_fleet_token_or_port_is_refused_at_once(
    v3_model: Path, tmp_path: Path
) -> None:
    with fleet_of(v3_model, "--expert-workers", "1") as fleet:
        fleet_address = next(
            part.partition("=")[2]
            for one in psutil.Process(fleet.process.pid).children(recursive=True)
            for part in listening(one)
        )
        done = run(*worker_command(tmp_path, fleet_address), **{TOKEN_VARIABLE: "wrong"})
        assert done.returncode == 2
        assert "fleet token" in last_line(done)
        done = run(*worker_command(tmp_path, fleet.grpc_address), **{TOKEN_VARIABLE: "wrong"})
        assert done.returncode == 2
        assert "fleet port" in last_line(done)
        assert fleet.status().ready


def listening(process: psutil.Process) -> list[str]:
    """fleet=HOST:PORT of the expert worker's command line."""
    line = process.cmdline()
    if "expert_worker" in line and "--router" in line:
        return [f"fleet={line[line.index('--router') + 1]}"]
    return []


@pytest.mark.e2e
def test_a_service_without_a_fleet_token_does_not_start(v3_model: Path, tmp_path: Path) -> None:
    done = run(*worker_command(tmp_path, "127.0.0.1:9"), **{TOKEN_VARIABLE: ""})
    assert done.returncode == 2
    assert TOKEN_VARIABLE in last_line(done)


@pytest.mark.e2e
def test_bad_requests_are_refused_by_field_and_the_fleet_goes_on(v3_model: Path) -> None:
    def refused(prompt: str | list[int], **sampling: Any) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            generate(fleet, prompt, **{"max_tokens": 2, **sampling})
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        return caught.value.details() or ""

    with fleet_of(v3_model, "--expert-workers", "2") as fleet:
        assert "129280" in refused([5, 129280])
        assert "min_p" in refused("x", min_p=0.1)
        assert "stop" in refused("x", stop=["end"])
        assert refused([])
        assert refused("x", temperature=-1.0)
        request = generation_pb2.GenerateRequest(text="x")
        request.sampling.max_tokens = 3
        request.sampling.ignore_eos = True
        chunks = list(fleet.generation().Generate(request, timeout=30))
        assert chunks[-1].finished.usage.completion_tokens == 3
