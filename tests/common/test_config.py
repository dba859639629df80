"""The configuration file: MindIE's layout, our section, every rule with its path."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import Config, check_experts, fleet_token, load_config
from common.errors import ConfigError

BUFFERS = [
    [1048576, 1.32],
    [524288, 1.4],
    [262144, 1.53],
    [131072, 1.8],
    [32768, 3.0],
    [8192, 5.2],
    [0, 8.0],
]


def example(lengths: tuple[int, int], deepseek: dict[str, Any]) -> dict[str, Any]:
    model = {
        "modelInstanceType": "Standard",
        "modelName": "DeepSeek-R1_w8a8",
        "modelWeightPath": "/home/data/DeepSeek-R1_w8a8",
        "worldSize": 8,
        "cpuMemSize": 5,
        "npuMemSize": -1,
        "backendType": "atb",
        "trustRemoteCode": False,
        "moe_ep": 8,
        "models": {"deepseekv2": deepseek},
    }
    deploy = {"maxSeqLen": lengths[0], "maxInputTokenLen": lengths[1], "truncation": False}
    return {"ModelDeployConfig": {**deploy, "ModelConfig": [model]}}


LEVEL_2 = example((2560, 2048), {"ep_level": 2, "alltoall_ep_buffer_scale_factors": BUFFERS})
LEVEL_1 = example(
    (66000, 65000), {"ep_level": 1, "enable_init_routing_cutoff": True, "topk_scaling_factor": 0.25}
)


def load(tmp_path: Path, document: Any, **overrides: Any) -> Config:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    return load_config(file, overrides)


@pytest.mark.parametrize(("document", "level", "longest"), [(LEVEL_2, 2, 2560), (LEVEL_1, 1, 66000)])
@pytest.mark.parametrize("is_inside", [False, True])
def test_the_examples_of_the_feature_load_unchanged(
    tmp_path: Path, document: dict[str, Any], level: int, longest: int, is_inside: bool
) -> None:
    config = load(tmp_path, {"BackendConfig": document} if is_inside else document)
    assert (config.ep_level, config.max_seq_len) == (level, longest)
    assert (config.world_size, config.moe_ep, config.moe_tp) == (8, 8, 1)
    assert config.kv_cache_bytes == 5 << 30


def test_without_a_file_there_are_defaults() -> None:
    config = load_config(None, None)
    assert (config.world_size, config.moe_ep, config.ep_level, config.port) == (2, 2, 1, 1025)
    assert config.warnings == ()


def changed(path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = copy.deepcopy(LEVEL_2)
    here: Any = document
    *keys, last = path.replace("MODEL", "ModelDeployConfig.ModelConfig.0").split(".")
    for key in keys:
        here = here[int(key)] if key.isdigit() else here.setdefault(key, {})
    here[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("MODEL.models.deepseekv2.ep_level", 2.0),
        ("MODEL.models.deepseekv2.ep_level", True),
        ("MODEL.models.deepseekv2.ep_level", 3),
        ("MODEL.models.deepseekv2.enable_init_routing_cutoff", 1),
        ("MODEL.models.deepseekv2.topk_scaling_factor", 0.5),
        ("MODEL.models.deepseekv2.topk_scaling_factor", 0),
        ("MODEL.models.deepseekv2.alltoall_ep_buffer_scale_factors", [[1, 1.0], [1, 2.0]]),
        ("MODEL.models", "{"),
        ("MODEL.models", {"deepseekv2": {}, "deepseek_v3": {}}),
        ("MODEL.worldSize", 4),
        ("MODEL.worldSize", "8"),
        ("MODEL.moe_tp", 2),
        ("MODEL.trustRemoteCode", True),
        ("MODEL.cpuMemSize", 0),
        ("ModelDeployConfig.maxSeqLen", 1),
        ("ModelDeployConfig.maxInputTokenLen", 100000),
        ("ModelDeployConfig.truncation", "left"),
        ("ServerConfig.httpsEnabled", True),
        ("ServerConfig.interCommTLSEnabled", True),
        ("BackendConfig.interNodeTLSEnabled", True),
        ("ServerConfig.port", 70000),
        ("ServerConfig.ipAddress", "0.0.0.0"),
        ("ExpertMesh.dataAddress", "0.0.0.0"),
        ("ExpertMesh.httpPort", 8080),
        ("ExpertMesh.noSuchKey", 1),
        ("ExpertMesh.redundantExperts", 8),
        ("ScheduleConfig.cacheBlockSize", 0),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(tmp_path: Path, path: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, changed(path, value))
    assert path.rsplit(".", maxsplit=1)[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_moe_tp_that_follows_from_the_others_is_refused_by_name(tmp_path: Path) -> None:
    document = changed("MODEL.moe_ep", 4)
    with pytest.raises(ConfigError, match="moe_tp is 2"):
        load(tmp_path, document)


def test_what_is_ignored_is_a_warning_by_name(tmp_path: Path) -> None:
    document = changed("MODEL.tp", 8)
    document["NoSuchSection"] = {}
    warnings = load(tmp_path, document).warnings
    assert any("ModelConfig[0].tp" in warning for warning in warnings)
    assert any("NoSuchSection" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "deepseekv3"])
@pytest.mark.parametrize("is_text", [False, True])
def test_other_names_of_the_family_are_taken(tmp_path: Path, name: str, is_text: bool) -> None:
    models: Any = {name: {"ep_level": 2}}
    assert load(tmp_path, changed("MODEL.models", json.dumps(models) if is_text else models)).ep_level == 2


def test_no_workers_means_experts_in_the_routers_process(tmp_path: Path) -> None:
    document = changed("MODEL.worldSize", 0)
    document["ModelDeployConfig"]["ModelConfig"][0]["moe_ep"] = 0
    config = load(tmp_path, document)
    assert (config.experts_in_process, config.world_size) == (True, 0)


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_ROUTER", "10.0.0.1:1028")
    monkeypatch.setenv("EXPERTMESH_FLEET_PORT", "0")
    monkeypatch.setenv("EXPERTMESH_FLEET_TOKEN", "secret")
    monkeypatch.setenv("EXPERTMESH_DEADLINE_FLOOR_SECONDS", "0.5")
    config = load(tmp_path, {"ExpertMesh": {"fleetPort": 7}})
    assert (config.router, config.fleet_port, config.deadline_floor_s) == ("10.0.0.1:1028", 0, 0.5)
    assert fleet_token(config) == "secret"
    assert "secret" not in config.model_dump_json()


def test_a_missing_token_and_a_group_that_does_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="EXPERTMESH_FLEET_TOKEN"):
        fleet_token(load(tmp_path, {}))
    with pytest.raises(ConfigError, match="n_routed_experts"):
        check_experts(load(tmp_path, LEVEL_2), 12)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(), max_size=2),
)
PATHS = st.sampled_from(
    [
        "MODEL.models.deepseekv2.ep_level",
        "MODEL.models.deepseekv2.alltoall_ep_buffer_scale_factors",
        "MODEL.models",
        "MODEL.worldSize",
        "MODEL.moe_ep",
        "MODEL.cpuMemSize",
        "MODEL.modelName",
        "ModelDeployConfig.ModelConfig",
        "ModelDeployConfig.maxSeqLen",
        "ModelDeployConfig.truncation",
        "ModelDeployConfig",
        "ServerConfig",
        "ServerConfig.port",
        "BackendConfig",
        "ExpertMesh.threads",
        "ExpertMesh.router",
        "ExpertMesh",
        "ScheduleConfig.maxBatchSize",
    ]
)
JSON = st.recursive(
    SCALARS, lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)


@given(path=PATHS, value=JSON)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_but_a_config_or_a_config_error_comes_out(tmp_path: Path, path: str, value: Any) -> None:
    try:
        config = load(tmp_path, changed(path, value))
    except ConfigError as error:
        is_one_sentence = "\n" not in str(error)
    else:
        is_one_sentence = isinstance(config, Config)
    assert is_one_sentence


@given(content=st.binary(max_size=80))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_config_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    try:
        load_config(file)
    except ConfigError:
        return
