"""What the child of `doctor` says: a whole checkpoint lacks nothing, and a part that is gone is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.checkpoint import Checkpoint
from common.torch_examination import examine_backends, examine_checkpoint, examine_torch
from tests.quantized_checkpoint import write_fp8, write_w8a8
from tests.source import ROOT
from tests.tiny_checkpoint import write_checkpoint


@pytest.fixture(params=["v2", "v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", request.param, vocab_size=128, num_shards=3)
    return tmp_path / "model"


@pytest.mark.parametrize("form", ["plain", "fp8", "w8a8"])
def test_a_whole_checkpoint_lacks_nothing(checkpoint: Path, form: str, tmp_path: Path) -> None:
    directory = checkpoint
    if form != "plain":
        directory = tmp_path / form
        (write_fp8 if form == "fp8" else write_w8a8)(checkpoint, directory)
    found = examine_checkpoint(directory)
    assert (found["num_missing"], found["missing"]) == (0, [])
    assert found["num_tensors"] == len(Checkpoint(directory).names)


def test_a_shard_that_no_index_names_is_missed(checkpoint: Path) -> None:
    [index] = checkpoint.glob("*.index.json")
    index.unlink()
    gone = sorted(checkpoint.glob("*.safetensors"))[1]
    gone.unlink()
    found = examine_checkpoint(checkpoint)
    assert found["num_missing"] > 0
    assert found["missing"][0].startswith("model.layers.")


def test_torch_and_gloo_are_asked() -> None:
    assert examine_torch()["version"].startswith("2.")
    assert "gloo" in examine_backends("127.0.0.1")["built"]


def test_one_subject_that_fails_leaves_the_others_their_answers(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "common.torch_examination", "--data-address", "192.0.2.77"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = {key: value for line in result.stdout.splitlines() for key, value in json.loads(line).items()}
    assert result.returncode == 0
    assert "no store can be opened on 192.0.2.77" in answers["backends"]["error"]
    assert answers["torch"]["version"]
    assert answers["native"]
    assert answers["cuda"]
    assert answers["npu"]
    assert "checkpoint" not in answers


def test_a_torch_that_cannot_be_imported_is_the_last_subject(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "try:\n    raise ImportError('libhccl.so: not there')\n"
        "except ImportError as error:\n    raise RuntimeError('Failed to load') from error\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "common.torch_examination"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(result.stdout) == {
        "torch": {"error": "RuntimeError: Failed to load (ImportError: libhccl.so: not there)"}
    }
