"""`expertmesh config check`: what is in effect in a valid file, and every bad value of another."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.config import Config
from expertmesh.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "tests" / "common"
MODEL = {
    "model_type": "deepseek_v2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}


def config_check(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertmesh", "config", "check", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def write(folder: Path, document: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(document))
    return file


def with_model(directory: Path, **model: Any) -> dict[str, Any]:
    return {"ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": str(directory), **model}]}}


@pytest.mark.parametrize("level", [1, 2])
def test_the_examples_of_the_feature_are_valid(level: int) -> None:
    result = config_check(EXAMPLES / f"ep_level_{level}.json")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    model = "ModelDeployConfig.ModelConfig[0]"
    assert f"world_size = 8 file {model}.worldSize" in lines
    assert "moe_tp = 1 inferred worldSize 8 / moe_ep 8" in lines
    assert f"ep_level = {level} file {model}.models.deepseekv2.ep_level" in lines
    assert "max_batch_size = 200 default ScheduleConfig.maxBatchSize" in lines
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert lines[-1] == f"valid, {len(warnings)} warning{'s' if len(warnings) != 1 else ''}"
    assert not [line for line in warnings if line.endswith("it is not built in this version")]
    assert warnings[-1] == (
        f'warning: {model}.modelWeightPath is "/data/weights/DeepSeek-R1_w8a8", which does not exist on this '
        "machine"
    )


def test_as_json_it_is_the_configuration_with_origins_and_warnings(tmp_path: Path) -> None:
    file = write(tmp_path, {"ServerConfig": {"port": 0}})
    result = config_check(file, "--json", EXPERTMESH_THREADS="3", EXPERTMESH_NONSENSE="1")
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert set(answer["config"]) == set(answer["origins"]) == set(Config.model_fields) - {"warnings"}
    assert (answer["config"]["port"], answer["config"]["threads"]) == (0, 3)
    assert answer["origins"]["port"] == {"kind": "file", "detail": "ServerConfig.port"}
    assert answer["origins"]["threads"] == {"kind": "environment", "detail": "EXPERTMESH_THREADS"}
    assert answer["origins"]["moe_ep"] == {"kind": "inferred", "detail": "worldSize 2 / moe_tp 1"}
    assert any("EXPERTMESH_NONSENSE" in warning for warning in answer["warnings"])


def test_every_bad_value_is_one_line_on_stderr(tmp_path: Path) -> None:
    document = {
        "ServerConfig": {"httpsEnabled": True, "port": "x"},
        "ModelDeployConfig": {"ModelConfig": [{"worldSize": 8, "moe_ep": 4, "trustRemoteCode": True}]},
        "ExpertMesh": {"nonsense": 1},
    }
    file = write(tmp_path, document)
    result = config_check(file, "--json")
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    named = [line.removeprefix(f"expertmesh: {file}: ").split(" ")[0] for line in lines]
    model = "ModelDeployConfig.ModelConfig[0]"
    assert sorted(named) == sorted(
        [
            *("ServerConfig.httpsEnabled", "ServerConfig.port", "ExpertMesh.nonsense"),
            *(f"{model}.moe_tp", f"{model}.trustRemoteCode"),
        ]
    )


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_what_is_no_configuration_is_one_line_and_exit_status_2(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    result = config_check(file)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"expertmesh: {file} ")
    assert len(result.stderr.splitlines()) == 1


def test_the_experts_of_a_checkpoint_that_is_there_must_be_divisible(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", MODEL)
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    fits = config_check(write(tmp_path, with_model(tmp_path / "model", worldSize=4)))
    assert (fits.returncode, fits.stdout.splitlines()[-1]) == (0, "valid, 0 warnings")
    refused = config_check(write(tmp_path, with_model(tmp_path / "model", worldSize=3)))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"expertmesh: {tmp_path / 'config.json'}: ModelConfig[0].moe_ep is 3, but a divisor of the "
        "checkpoint's n_routed_experts (8) is needed: choose another worldSize or moe_ep\n"
    )


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    result = config_check(write(tmp_path, with_model(tmp_path / "model")))
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        f'modelWeightPath is "{tmp_path / "model"}", but {tmp_path}/model/config.json is missing'
        in result.stderr
    )


def test_the_configuration_of_the_compose_file_is_valid() -> None:
    assert config_check(ROOT / "compose" / "config.json").returncode == 0


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "ServerConfig": st.dictionaries(st.sampled_from(["port", "ipAddress", "a\nb"]), SCALARS),
        "ExpertMesh": st.dictionaries(st.sampled_from(["router", "device", "threads"]), SCALARS),
        "ModelDeployConfig": st.fixed_dictionaries(
            {
                "ModelConfig": st.lists(
                    st.dictionaries(
                        st.sampled_from(["modelWeightPath", "worldSize", "moe_ep", "models", "cpuMemSize"]),
                        SCALARS | st.sampled_from([0, 2, "/", "{}"]),
                    ),
                    max_size=2,
                )
            }
        )
        | SCALARS,
    },
)


@given(document=DOCUMENTS | SCALARS, as_json=st.booleans())
@settings(max_examples=200, deadline=None)
def test_it_ends_with_0_or_2_whatever_the_file_holds(
    tmp_path_factory: pytest.TempPathFactory, document: Any, as_json: bool
) -> None:
    file = write(tmp_path_factory.getbasetemp(), document)
    result = CliRunner().invoke(app, ["config", "check", str(file), *(["--json"] if as_json else [])])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 2)
    assert (result.exit_code == 2) == bool(result.stderr)
    assert "Traceback" not in result.output
