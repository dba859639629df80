"""What has no effect is a warning by name, and what asks for nothing is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.common.config_examples import BUFFER_FACTORS, LEVEL_1, LEVEL_2, SCHEDULE, changed, completed, load

MODEL = "ModelDeployConfig.ModelConfig[0]"
EP = f"{MODEL}.models.deepseekv2"
NOT_BUILT = "has no effect: it is not built in this version"


def test_the_example_of_ep_level_2_asks_for_nothing_that_is_not_done(tmp_path: Path) -> None:
    assert load(tmp_path, LEVEL_2).warnings == ()
    devices = "BackendConfig.npuDeviceIds is ignored: ExpertMesh.device says what computes"
    assert load(tmp_path, completed(LEVEL_2)).warnings == (devices,)


def test_the_example_of_ep_level_1_asks_for_nothing_that_is_not_done(tmp_path: Path) -> None:
    assert load(tmp_path, LEVEL_1).warnings == ()


def test_what_has_no_effect_is_silent_at_its_default(tmp_path: Path) -> None:
    defaults = {"cutoffMinRows": 4096, "groupedMatmul": "auto"}
    document = changed("EP", {"enable_init_routing_cutoff": False, "topk_scaling_factor": None}, LEVEL_2)
    assert load(tmp_path, {**document, "ExpertMesh": defaults}).warnings == ()


@pytest.mark.parametrize(
    ("level", "name", "value"),
    [
        (1, "EP.alltoall_ep_buffer_scale_factors", BUFFER_FACTORS),
        (1, "ExpertMesh.topology", "direct"),
        (2, "EP.enable_init_routing_cutoff", True),
        (2, "ExpertMesh.cutoffMinRows", 4096),
    ],
)
def test_a_key_of_the_other_level_is_named(tmp_path: Path, level: int, name: str, value: Any) -> None:
    document = changed(name, value, changed("EP", {"ep_level": level}))
    path = name.replace("EP.", f"{EP}.")
    expected = f"{path} has no effect at ep_level {level}: it acts at ep_level {3 - level}"
    assert expected in load(tmp_path, document).warnings


def test_a_factor_of_the_other_level_is_named(tmp_path: Path) -> None:
    cutoff = {"ep_level": 2, "enable_init_routing_cutoff": True, "topk_scaling_factor": 0.5}
    named = [
        one.split(" ")[0] for one in load(tmp_path, changed("EP", cutoff)).warnings if "ep_level 2" in one
    ]
    assert named == [f"{EP}.enable_init_routing_cutoff", f"{EP}.topk_scaling_factor"]


@pytest.mark.parametrize(
    ("level", "path", "value"),
    [
        (2, "EP.enable_init_routing_cutoff", False),
        (2, "EP.topk_scaling_factor", None),
        (1, "ExpertMesh.topology", "auto"),
    ],
)
def test_a_key_of_the_other_level_may_ask_for_nothing(
    tmp_path: Path, level: int, path: str, value: Any
) -> None:
    assert load(tmp_path, changed(path, value, changed("EP", {"ep_level": level}))).warnings == ()


@pytest.mark.parametrize(("factor", "is_small"), [(0.25, False), (0.24, True)])
def test_a_factor_that_mindie_refuses_is_named(tmp_path: Path, factor: float, is_small: bool) -> None:
    warnings = load(tmp_path, changed("EP.topk_scaling_factor", factor, LEVEL_1)).warnings
    assert any("MindIE refuses less than 0.25" in one for one in warnings) == is_small


def test_the_cache_of_an_npu_has_a_size_of_its_own(tmp_path: Path) -> None:
    sizes = {"ModelDeployConfig": {"ModelConfig": [{"cpuMemSize": 2, "npuMemSize": 7}]}}
    on_npu = load(tmp_path, {**sizes, "ExpertMesh": {"device": "npu"}})
    assert (on_npu.kv_cache_bytes, load(tmp_path, sizes).kv_cache_bytes) == (7 << 30, 2 << 30)
    assert not any("npuMemSize" in warning for warning in on_npu.warnings)
    unsaid = {"ModelDeployConfig": {"ModelConfig": [{"cpuMemSize": 2}]}, "ExpertMesh": {"device": "npu"}}
    assert load(tmp_path, unsaid).kv_cache_bytes == 2 << 30


@pytest.mark.parametrize(
    ("path", "value", "warning"),
    [
        ("MODEL.tp", 8, f"{MODEL}.tp is ignored: attention runs on the router, undivided"),
        ("MODEL.dp", -1, f"{MODEL}.dp is ignored: attention runs on the router, undivided"),
        ("MODEL.npuMemSize", 15, f"{MODEL}.npuMemSize is ignored: it sizes the cache on an NPU"),
        ("MODEL.nonsense", 1, f"{MODEL}.nonsense is ignored: expertmesh does not know this key"),
        ("NoSuchSection", {}, "NoSuchSection is ignored: expertmesh does not know this key"),
        ("a\nb", 1, r"'a\nb' is ignored: expertmesh does not know this key"),
        (
            "EP.eplb",
            {"level": 1},
            f"{EP}.eplb.level is ignored: section ExpertMesh has the settings for copies of experts",
        ),
        (
            "EP.h3p",
            {"enable_gating_dp": "false"},
            f"{EP}.h3p.enable_gating_dp is ignored: attention and dense layers run on the router, undivided",
        ),
        (
            "ServerConfig.tlsCert",
            "my.pem",
            "ServerConfig.tlsCert is ignored: TLS is not built in this version",
        ),
        (
            "ServerConfig.HealthCheckConfig",
            {"npuUsageThreshold": 0},
            "ServerConfig.HealthCheckConfig.npuUsageThreshold is ignored: grpc.health.v1 says whether the "
            "router serves",
        ),
        (
            "ScheduleConfig.maxPrefillBatchSize",
            8,
            "ScheduleConfig.maxPrefillBatchSize is ignored: maxPrefillTokens and maxBatchSize bound a step",
        ),
        (
            "LogConfig",
            {"dynamicLogLevel": "debug"},
            "LogConfig.dynamicLogLevel is ignored: ExpertMesh.logLevel says what is logged",
        ),
        ("Version", "2.0.0", "Version is ignored: expertmesh does not need it"),
    ],
)
def test_what_is_ignored_is_named_with_its_path(tmp_path: Path, path: str, value: Any, warning: str) -> None:
    assert load(tmp_path, changed(path, value)).warnings == (warning,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("MODEL.tp", 1),
        ("EP.h3p", {"enable_gating_dp": "true", "enable_shared_expert_dp": "false"}),
        ("EP.communication_backend", {"prefill": "lccl", "decode": "lccl"}),
        ("ScheduleConfig", SCHEDULE),
    ],
)
def test_what_is_at_its_default_asks_for_nothing(tmp_path: Path, path: str, value: Any) -> None:
    assert load(tmp_path, changed(path, value)).warnings == ()


def test_unknown_variables_are_named_unless_kubernetes_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_NONSENSE", "1")
    monkeypatch.setenv("EXPERTMESH_ROUTER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("EXPERTMESH_ROUTER_PORT_1025_TCP", "tcp://10.0.0.1:1025")
    warning = "EXPERTMESH_NONSENSE is ignored: expertmesh does not know this variable"
    assert load(tmp_path, LEVEL_2).warnings == (warning,)
