"""What can be known before weights load is refused before that, by real commands and services."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import command
from tests.rank_tables import write_table

pytestmark = pytest.mark.e2e
TIMEOUT_S = 120
TOKEN = {"EXPERTMESH_FLEET_TOKEN": "a-secret-of-the-fleet"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment}
    )


def router(folder: Path, model: Path, *, schedule: Any = None, **entry: Any) -> list[str]:
    """The command of a router on free ports."""
    document = {
        "ServerConfig": {"port": 0, "managementPort": 0},
        "ScheduleConfig": schedule or {},
        "ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": str(model), "worldSize": 2, **entry}]},
        "ExpertMesh": {"fleetPort": 0},
    }
    file = folder / "config.json"
    file.write_text(json.dumps(document))
    return [sys.executable, "-m", "router", "--config", str(file)]


@pytest.fixture
def large_model(v3_model: Path, tmp_path: Path) -> Path:
    """A model whose config.json makes each expert 100 GiB."""
    directory = tmp_path / "model"
    shutil.copytree(v3_model, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"moe_intermediate_size": 1 << 28}))
    return directory


def test_up_starts_nothing_that_does_not_fit_this_machine(large_model: Path) -> None:
    done = run(*command("up", "--model", str(large_model), "--port", "0"))
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert "the free memory of this machine for the router and 2 expert workers is " in sentence
    assert " of weights, " in sentence
    assert " of KV cache) is needed: lower ModelConfig[0].cpuMemSize" in sentence


def test_config_check_says_what_is_needed_and_warns_where_this_machine_has_less(large_model: Path) -> None:
    file = large_model / "of_the_test.json"
    file.write_text(
        json.dumps({"ModelDeployConfig": {"ModelConfig": [{"modelWeightPath": str(large_model)}]}})
    )
    done = run(*command("config", "check", str(file)))
    assert done.returncode == 0, done.stderr
    checked = [line for line in done.stdout.splitlines() if line.startswith(("checked: ", "warning: "))]
    assert checked[0] == (
        "checked: ModelConfig[0].moe_ep is 2, and a divisor of the checkpoint's n_routed_experts (24) "
        "is needed"
    )
    assert checked[1].startswith("checked: the free memory of this machine for the router is ")
    # 12 experts of 3 layers, each 3 x 2**28 x 64 bfloat16.
    assert checked[2].startswith("warning: the free memory of this machine for one expert worker is ")
    assert "3456.0 GiB of weights" in checked[2]


def test_a_router_refuses_a_cache_that_it_has_no_memory_for(v3_model: Path, tmp_path: Path) -> None:
    schedule = {"maxBatchSize": 819200}
    done = run(*router(tmp_path, v3_model, schedule=schedule, cpuMemSize=1 << 20), **TOKEN)
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("the free memory of this machine for the router is ")
    assert " GiB of KV cache) is needed: lower ModelConfig[0].cpuMemSize" in sentence
    assert "ready" not in done.stdout


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('"completed"', '"initializing"'), 'status is "initializing", but must be "completed"'),
        (('"rank_id": "1"', '"rank_id": "7"'), "server_list[1].device[0].rank_id is "),
        (("server_count", "count"), "the file is an object with 4 keys, but must have the key server_count"),
        (("", ""), "ModelConfig[0].worldSize is 3, but the number of ranks in the rank table (2) is needed"),
    ],
)
def test_a_rank_table_that_is_wrong_is_one_sentence_before_anything_starts(
    v3_model: Path, tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    table = write_table(tmp_path, {"127.0.0.1": {0: 0}, "127.0.0.2": {0: 1}})
    table.write_text(table.read_text().replace(*change))
    environment = {"RANK_TABLE_FILE": str(table), **TOKEN}
    world_size = 3 if change == ("", "") else 2
    start = router(tmp_path, v3_model, worldSize=world_size)
    done = run(*start, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    sentence = done.stderr.splitlines()[-1]
    assert named in sentence
    checked = run(*command("config", "check", start[-1]), **environment)
    assert (checked.returncode, checked.stdout) == (2, "")
    assert checked.stderr == f"expertmesh: {start[-1]}: {sentence}\n"


def test_a_rank_table_has_no_say_in_a_fleet_on_one_machine(v3_model: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path, {"10.0.0.1": {0: 0}, "10.0.0.2": {0: 1}})
    ask = command("generate", "Far", "--model", str(v3_model), "--expert-workers", "1", "--max-tokens", "2")
    done = run(*ask, RANK_TABLE_FILE=str(table))
    assert done.returncode == 0, done.stderr
    assert "RANK_TABLE_FILE has no effect: a rank table is about two servers or more" in done.stderr
