"""The configuration file: MindIE's layout, our section, what is inferred, and where each value came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import common.config
from common.config import KEYS, Config, fleet_token, load_config, resolve
from common.errors import ConfigError
from tests.common.config_examples import (
    BACKEND,
    BUFFER_FACTORS,
    LEVEL_1,
    LEVEL_2,
    SCHEDULE,
    changed,
    completed,
    load,
    write,
)


@pytest.mark.parametrize("is_completed", [False, True])
def test_the_example_of_ep_level_2_loads_unchanged(tmp_path: Path, is_completed: bool) -> None:
    config = load(tmp_path, completed(LEVEL_2) if is_completed else LEVEL_2)
    assert (config.ep_level, config.alltoall_ep_buffer_scale_factors) == (2, BUFFER_FACTORS)
    assert (config.enable_init_routing_cutoff, config.topk_scaling_factor) == (False, None)
    assert (config.max_seq_len, config.max_input_token_len, config.truncation) == (2560, 2048, 0)
    assert (config.world_size, config.moe_ep, config.moe_tp) == (8, 8, 1)
    assert (config.model_name, config.model_path) == ("DeepSeek-R1_w8a8", "/data/weights/DeepSeek-R1_w8a8")
    assert config.kv_cache_bytes == 5 * 2**30


@pytest.mark.parametrize("is_completed", [False, True])
def test_the_example_of_ep_level_1_loads_unchanged(tmp_path: Path, is_completed: bool) -> None:
    config = load(tmp_path, completed(LEVEL_1) if is_completed else LEVEL_1)
    assert (config.ep_level, config.alltoall_ep_buffer_scale_factors) == (1, BUFFER_FACTORS)
    assert (config.enable_init_routing_cutoff, config.topk_scaling_factor) == (True, 0.25)
    assert (config.max_seq_len, config.max_input_token_len) == (66000, 65000)
    assert (config.world_size, config.moe_ep, config.moe_tp) == (8, 8, 1)


def test_without_a_file_there_are_defaults() -> None:
    config = load_config(None, None)
    assert (config.host, config.port, config.management_host, config.management_port) == (
        *("127.0.0.1", 1025),
        *("127.0.0.1", 1026),
    )
    assert (config.world_size, config.moe_ep, config.moe_tp, config.ep_level) == (2, 2, 1, 1)
    assert (config.max_seq_len, config.max_input_token_len, config.max_iter_times) == (None, None, None)
    assert (config.block_size, config.max_prefill_tokens, config.max_batch_size) == (128, 8192, 200)
    assert (config.kv_cache_bytes, config.model_name, config.model_path) == (2**30, "deepseek", None)
    assert (config.cutoff_min_rows, config.grouped_matmul, config.topology) == (4096, "auto", "auto")
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"worldSize": 8}, (8, 8, 1)),
        ({"moe_ep": 4}, (4, 4, 1)),
        ({"worldSize": 8, "moe_tp": 1}, (8, 8, 1)),
        ({"moe_ep": 4, "moe_tp": 1}, (4, 4, 1)),
        ({}, (2, 2, 1)),
    ],
)
def test_what_is_absent_of_the_group_follows_from_the_rest(
    tmp_path: Path, group: dict[str, int], expected: tuple[int, int, int]
) -> None:
    config = load(tmp_path, {"ModelDeployConfig": {"ModelConfig": [group]}})
    assert (config.world_size, config.moe_ep, config.moe_tp) == expected


@pytest.mark.parametrize("group", [{"worldSize": 0}, {"worldSize": 0, "moe_ep": 0}, {"moe_ep": 0}])
def test_no_workers_means_experts_in_the_routers_process(tmp_path: Path, group: dict[str, int]) -> None:
    effective = resolve(write(tmp_path, {"ModelDeployConfig": {"ModelConfig": [group]}}))
    config = effective.config
    assert (config.experts_in_process, config.world_size, config.moe_ep) == (True, 0, 0)
    assert effective.origins["experts_in_process"].detail == "worldSize 0"


@pytest.mark.parametrize(("value", "expected"), [(True, -1), (False, 0), (-1, -1), (0, 0), (1, 1)], ids=repr)
def test_truncation_may_be_a_boolean_or_a_direction(tmp_path: Path, value: Any, expected: int) -> None:
    assert load(tmp_path, changed("ModelDeployConfig.truncation", value)).truncation == expected


@pytest.mark.parametrize("name", ["deepseekv2", "deepseek_v2", "deepseek_v3", "deepseekv3"])
@pytest.mark.parametrize("is_text", [False, True])
def test_other_names_of_the_family_are_taken(tmp_path: Path, name: str, is_text: bool) -> None:
    models: Any = {name: {"ep_level": 2, "alltoall_ep_buffer_scale_factors": [[9, 2], [0, 3.5]]}}
    config = load(tmp_path, changed("MODEL.models", json.dumps(models) if is_text else models))
    assert (config.ep_level, config.alltoall_ep_buffer_scale_factors) == (2, ((9, 2.0), (0, 3.5)))


def test_schedule_and_deploy_config_may_stand_in_different_places(tmp_path: Path) -> None:
    schedule = {**SCHEDULE, "maxBatchSize": 7}
    config = load(tmp_path, {**LEVEL_2, "BackendConfig": {**BACKEND, "ScheduleConfig": schedule}})
    assert (config.max_batch_size, config.max_seq_len, config.max_iter_times) == (7, 2560, 512)


def test_the_environment_overrides_the_file_and_overrides_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_ROUTER", "10.0.0.1:1028")
    monkeypatch.setenv("EXPERTMESH_FLEET_PORT", "0")
    monkeypatch.setenv("EXPERTMESH_DEADLINE_FLOOR_SECONDS", "0.5")
    monkeypatch.setenv("EXPERTMESH_GROUPED_MATMUL", "on")
    document = {"ExpertMesh": {"fleetPort": 7}}
    config = load(tmp_path, document)
    assert (config.router, config.fleet_port, config.deadline_floor_s) == ("10.0.0.1:1028", 0, 0.5)
    assert config.grouped_matmul == "on"
    assert load(tmp_path, document, **{"ExpertMesh.fleetPort": 9}).fleet_port == 9


def test_the_environment_sets_what_differs_between_containers_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_WORLD_SIZE", "3")
    monkeypatch.setenv("EXPERTMESH_IP_ADDRESS", "10.0.0.1")
    monkeypatch.setenv("EXPERTMESH_MANAGEMENT_IP_ADDRESS", "10.0.0.2")
    for document in ({}, {"BackendConfig": {"ModelDeployConfig": {"ModelConfig": [{"worldSize": 8}]}}}):
        config = load(tmp_path, document)
        assert (config.world_size, config.moe_ep) == (3, 3)
        assert (config.host, config.management_host) == ("10.0.0.1", "10.0.0.2")


def test_the_fleet_token_is_read_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="EXPERTMESH_FLEET_TOKEN"):
        fleet_token(load(tmp_path, {}))
    (tmp_path / "token").write_text("from-a-file\n")
    config = load(tmp_path, {"ExpertMesh": {"fleetTokenFile": str(tmp_path / "token")}})
    assert fleet_token(config) == "from-a-file"
    monkeypatch.setenv("EXPERTMESH_FLEET_TOKEN", "secret")
    config = load(tmp_path, {})
    assert fleet_token(config) == "secret"
    assert "secret" not in config.model_dump_json()


def test_every_value_knows_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_THREADS", "2")
    monkeypatch.setenv("EXPERTMESH_DTYPE", "float32")
    overrides = {"ServerConfig.port": 0, "ExpertMesh.dtype": "bfloat16"}
    effective = resolve(write(tmp_path, completed(LEVEL_2)), overrides)
    found = {name: (origin.kind, origin.detail) for name, origin in effective.origins.items()}
    model = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
    assert found["world_size"] == ("file", f"{model}.worldSize")
    assert found["ep_level"] == ("file", f"{model}.models.deepseekv2.ep_level")
    assert found["max_batch_size"] == ("file", "BackendConfig.ScheduleConfig.maxBatchSize")
    assert found["moe_tp"] == ("inferred", "worldSize 8 / moe_ep 8")
    assert found["fleet_host"] == ("inferred", "ExpertMesh.dataAddress")
    assert found["threads"] == ("environment", "EXPERTMESH_THREADS")
    assert found["port"] == ("override", "ServerConfig.port")
    assert found["dtype"] == ("override", "ExpertMesh.dtype")
    assert found["log_level"] == ("default", "ExpertMesh.logLevel")
    assert found["topk_scaling_factor"] == ("default", f"{model}.models.deepseekv2.topk_scaling_factor")
    assert set(found) == set(Config.model_fields) - {"warnings"}


def test_experts_in_process_win_over_the_size_in_the_file(tmp_path: Path) -> None:
    effective = resolve(write(tmp_path, LEVEL_2), {"ExpertMesh.expertsInProcess": True})
    assert (effective.config.world_size, effective.config.experts_in_process) == (0, True)
    assert effective.origins["world_size"].detail == "ExpertMesh.expertsInProcess true"
    assert effective.origins["experts_in_process"].kind == "override"


def keys_of_cell(cell: str, field: str) -> set[str]:
    """The keys that a cell of the table names: "ServerConfig.ipAddress, .port"."""
    first, *_ = words = [word.split(" ")[0] for word in cell.split(", ")]
    if cell.endswith(", by the same name"):
        return {f"{first}.{field}"}
    section = first.partition(".")[0]
    return {f"{section}{word}" if word.startswith(".") else word for word in words}


def test_the_table_at_the_head_of_the_module_names_every_field_and_its_key() -> None:
    table = common.config.__doc__ or ""
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if "|" in line]
    documented = {field: cell for fields, cell in rows[2:] for field in fields.split(", ")}
    assert set(documented) == set(Config.model_fields)
    assert {
        field for field, key in KEYS.items() if key not in keys_of_cell(documented[field], field)
    } == set()
