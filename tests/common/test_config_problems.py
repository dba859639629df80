"""What is wrong in a configuration: every rule with its path, value and sentence, and all of them at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import load_config
from common.errors import ConfigError
from tests.common.config_examples import LEVEL_1, LEVEL_2, SCHEDULE, changed, load, write

MODEL = "ModelDeployConfig.ModelConfig[0]"
EP = f"{MODEL}.models.deepseekv2"
FACTORS = f"{EP}.alltoall_ep_buffer_scale_factors"
DESCENDING = "must be strictly descending by the first value of each pair"

SENTENCES: list[tuple[str, Any, str]] = [
    ("EP.ep_level", 2.0, f"{EP}.ep_level is 2.0, but it must be an integer"),
    ("EP.ep_level", True, f"{EP}.ep_level is true, but it must be an integer"),
    ("EP.ep_level", "2", f'{EP}.ep_level is "2", but it must be an integer'),
    ("EP.ep_level", None, f"{EP}.ep_level is null, but it must be an integer"),
    ("EP.ep_level", 0, f"{EP}.ep_level is 0, but it must be at least 1"),
    ("EP.ep_level", 3, f"{EP}.ep_level is 3, but it must be at most 2"),
    (
        "EP.enable_init_routing_cutoff",
        1,
        f"{EP}.enable_init_routing_cutoff is 1, but it must be true or false",
    ),
    (
        "EP.topk_scaling_factor",
        0.5,
        f"{EP}.topk_scaling_factor is 0.5, but it acts only where enable_init_routing_cutoff is true: "
        "set that too, or leave both out",
    ),
    ("EP.topk_scaling_factor", 0, f"{EP}.topk_scaling_factor is 0, but it must be above 0"),
    ("EP.topk_scaling_factor", 1.5, f"{EP}.topk_scaling_factor is 1.5, but it must be at most 1.0"),
    ("EP.topk_scaling_factor", True, f"{EP}.topk_scaling_factor is true, but it must be a number"),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [[0, 1.0], [9, 2.0]],
        f"{FACTORS} is [[0, 1.0], [9, 2.0]], but it {DESCENDING}",
    ),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [[9, 1.0], [9, 2.0]],
        f"{FACTORS} is [[9, 1.0], [9, 2.0]], but it {DESCENDING}",
    ),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [],
        f"{FACTORS} is [], but it must have at least one [tokens, factor] pair",
    ),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [[-1, 1.0]],
        f"{FACTORS}[0][0] is -1, but it must be at least 0",
    ),
    ("EP.alltoall_ep_buffer_scale_factors", [[1, 0]], f"{FACTORS}[0][1] is 0, but it must be above 0"),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [[1.0, 1.0]],
        f"{FACTORS}[0][0] is 1.0, but it must be an integer",
    ),
    (
        "EP.alltoall_ep_buffer_scale_factors",
        [[1]],
        f"{FACTORS}[0] is [1], but it must have two elements",
    ),
    (
        "MODEL.models",
        "{",
        f'{MODEL}.models is "{{", but it must be an object, or a string that holds a JSON object',
    ),
    (
        "MODEL.models",
        {"deepseekv2": {}, "deepseek_v3": {}},
        f'{MODEL}.models is {{"deepseekv2": {{}}, "deepseek_v3": {{}}}}, but it must not hold both '
        "deepseekv2 and deepseek_v3: they mean the same",
    ),
    (
        "MODEL.models",
        '{"deepseek_v3": {"ep_level": 4}}',
        f"{MODEL}.models.deepseek_v3.ep_level is 4, but it must be at most 2",
    ),
    (
        "MODEL.worldSize",
        4,
        f"{MODEL}.worldSize is 4, but it must equal moe_ep * moe_tp, and 8 * 1 is 8: leave moe_ep and moe_tp "
        "out, or make them fit",
    ),
    ("MODEL.worldSize", "8", f'{MODEL}.worldSize is "8", but it must be an integer'),
    (
        "MODEL.moe_ep",
        4,
        f"{MODEL}.moe_tp is 2, but an expert cannot be divided among workers in this version: set moe_ep to "
        "worldSize (8) and leave moe_tp out",
    ),
    (
        "MODEL.trustRemoteCode",
        True,
        f"{MODEL}.trustRemoteCode is true, but nothing in a checkpoint is ever executed: set it to false",
    ),
    ("MODEL.cpuMemSize", 0, f"{MODEL}.cpuMemSize is 0, but it must be above 0"),
    (
        "MODEL.modelName",
        "-R1",
        f'{MODEL}.modelName is "-R1", but it must be letters, digits, dots, dashes and underscores, and '
        "begin and end with a letter or digit",
    ),
    (
        "MODEL.backendType",
        "tpu",
        f"{MODEL}.backendType is \"tpu\", but it must be 'atb', 'ms' or 'torch'",
    ),
    (
        "ModelDeployConfig.ModelConfig",
        [],
        "ModelDeployConfig.ModelConfig is [], but it must have exactly 1 entry, not 0: one model is served",
    ),
    ("ModelDeployConfig.maxSeqLen", 1, "ModelDeployConfig.maxSeqLen is 1, but it must be at least 2"),
    (
        "ModelDeployConfig.maxInputTokenLen",
        2561,
        "ModelDeployConfig.maxInputTokenLen is 2561, but it must not be above maxSeqLen (2560)",
    ),
    (
        "ModelDeployConfig.truncation",
        "left",
        'ModelDeployConfig.truncation is "left", but it must be true or -1 (cut on the right), false or 0 '
        "(refuse), or 1 (cut on the left)",
    ),
    (
        "ScheduleConfig.maxIterTimes",
        3000,
        "ScheduleConfig.maxIterTimes is 3000, but it must not be above maxSeqLen (2560)",
    ),
    ("ScheduleConfig.cacheBlockSize", 0, "ScheduleConfig.cacheBlockSize is 0, but it must be at least 1"),
    ("ScheduleConfig.policyType", 2, "ScheduleConfig.policyType is 2, but it must be 0, 4, 5, 6 or 7"),
    ("ServerConfig", [], "ServerConfig is [], but it must be an object"),
    ("ServerConfig.port", 70000, "ServerConfig.port is 70000, but it must be at most 65535"),
    ("ServerConfig.tokenTimeout", 0, "ServerConfig.tokenTimeout is 0, but it must be at least 1"),
    (
        "ServerConfig.tlsCaFile",
        list("abcd"),
        'ServerConfig.tlsCaFile is ["a", "b", "c", "d"], but it must have at most 3 elements',
    ),
    (
        "ServerConfig.ipAddress",
        "0.0.0.0",
        'ServerConfig.ipAddress is "0.0.0.0", which is every interface of this host: name one address, or '
        "set ServerConfig.allowAllZeroIpListening to true",
    ),
    ("ServerConfig.ipAddress", "", 'ServerConfig.ipAddress is "", but it must have at least 1 characters'),
    (
        "ExpertMesh.dataAddress",
        "::",
        'ExpertMesh.dataAddress is "::", but the data plane has no authentication: name the address of the '
        "interface that reaches the other services",
    ),
    (
        "ExpertMesh.httpPort",
        8080,
        "ExpertMesh.httpPort is 8080, but HTTP is not built in this version: leave it out",
    ),
    (
        "ExpertMesh.device",
        "cuda",
        'ExpertMesh.device is "cuda", but only "cpu" and "npu" are built in this version',
    ),
    (
        "ExpertMesh.device",
        "tpu",
        "ExpertMesh.device is \"tpu\", but it must be 'cpu', 'cuda' or 'npu'",
    ),
    ("ExpertMesh.router", "here", 'ExpertMesh.router is "here", but it must be HOST:PORT'),
    (
        "ExpertMesh.redundantExperts",
        -1,
        "ExpertMesh.redundantExperts is -1, but it must be at least 0",
    ),
    *(
        (
            path,
            True,
            f"{path} is true, but TLS is not built in this version, and nothing is sent in plaintext "
            "silently: set it to false",
        )
        for path in (
            "ServerConfig.httpsEnabled",
            "ServerConfig.interCommTLSEnabled",
            "BackendConfig.interNodeTLSEnabled",
        )
    ),
]


def problems(folder: Path, document: Any) -> list[str]:
    """The sentences without the name of the file."""
    file = write(folder, document)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert all(one.startswith(f"{file}: ") for one in caught.value.problems)
    return [one.removeprefix(f"{file}: ") for one in caught.value.problems]


@pytest.mark.parametrize(("path", "value", "sentence"), SENTENCES, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_one_sentence(tmp_path: Path, path: str, value: Any, sentence: str) -> None:
    assert problems(tmp_path, changed(path, value)) == [sentence]


def test_an_unknown_key_of_our_own_section_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    (sentence,) = problems(tmp_path, changed("ExpertMesh.fleetport", 1))
    assert sentence.startswith("ExpertMesh.fleetport is no key of its section, whose keys are ")
    assert " fleetPort, " in sentence


def test_all_bad_values_are_listed_at_once(tmp_path: Path) -> None:
    document = changed("EP.ep_level", 2.0)
    document = changed("EP.alltoall_ep_buffer_scale_factors", [[0, 1.0], [9, -1]], document)
    document = changed("MODEL.moe_ep", 4, document)
    document = changed("ModelDeployConfig.maxInputTokenLen", 100000, document)
    document = changed("ServerConfig", {"httpsEnabled": True, "port": "x"}, document)
    document = changed("ExpertMesh", {"nonsense": 1, "threads": 0}, document)
    named = [sentence.split(" ")[0] for sentence in problems(tmp_path, document)]
    assert sorted(named) == sorted(
        [
            f"{EP}.ep_level",
            f"{FACTORS}[1][1]",
            f"{MODEL}.moe_tp",
            "ModelDeployConfig.maxInputTokenLen",
            "ServerConfig.httpsEnabled",
            "ServerConfig.port",
            "ExpertMesh.nonsense",
            "ExpertMesh.threads",
        ]
    )


def test_all_bad_values_inside_a_string_are_listed_too(tmp_path: Path) -> None:
    text = '{"deepseek_v3": {"ep_level": 9, "enable_init_routing_cutoff": 0, "eplb": {"level": 7}}}'
    document = changed("MODEL.trustRemoteCode", True, changed("MODEL.models", text))
    assert len(problems(tmp_path, document)) == 4


@pytest.mark.parametrize("is_text", [False, True])
def test_rules_between_keys_are_applied_to_what_is_left(tmp_path: Path, is_text: bool) -> None:
    table = [[-1, 1.0], [9, -1]]
    parameters = {"topk_scaling_factor": 0.5, "alltoall_ep_buffer_scale_factors": table}
    models: Any = {"deepseekv2": parameters}
    named = problems(tmp_path, changed("MODEL.models", json.dumps(models) if is_text else models))
    assert [one.split(" ")[0] for one in named] == [
        *(f"{FACTORS}[0][0]", f"{FACTORS}[1][1]"),
        f"{EP}.topk_scaling_factor",
    ]


def test_the_message_is_the_first_problem_and_how_many_follow(tmp_path: Path) -> None:
    document = changed("ServerConfig", {"port": -1, "managementPort": -1, "metricsPort": -1})
    with pytest.raises(ConfigError, match=r"ServerConfig.port is -1, .* \(2 more to correct: .*\)$"):
        load(tmp_path, document)


@pytest.mark.parametrize(
    "document",
    [
        changed("EP", {"enable_init_routing_cutoff": 1, "topk_scaling_factor": 0.5}),
        changed("ServerConfig", {"allowAllZeroIpListening": 1, "ipAddress": "0.0.0.0"}),
        changed("MODEL", {"worldSize": 8, "moe_ep": "8", "moe_tp": 1}),
        changed("MODEL", {"worldSize": 8, "moe_ep": 4, "moe_tp": "2"}),
        changed("ModelDeployConfig.maxSeqLen", "2560"),
    ],
)
def test_no_rule_is_applied_to_a_value_that_is_bad_by_itself(tmp_path: Path, document: Any) -> None:
    assert len(problems(tmp_path, document)) == 1


@pytest.mark.parametrize(
    "group", [{"worldSize": 7, "moe_tp": 2}, {"moe_ep": 2, "moe_tp": 2}, {"worldSize": 3, "moe_ep": 0}]
)
def test_a_group_that_does_not_fit_is_refused(tmp_path: Path, group: dict[str, int]) -> None:
    document = {"ModelDeployConfig": {"ModelConfig": [group]}}
    assert all(
        one.startswith((f"{MODEL}.worldSize", f"{MODEL}.moe_tp")) for one in problems(tmp_path, document)
    )


def test_links_are_refused_where_rows_are_on_a_device(tmp_path: Path) -> None:
    (sentence,) = problems(tmp_path, {"ExpertMesh": {"device": "npu", "exchange": "links"}})
    assert sentence == (
        'ExpertMesh.exchange is "links", but rows of device "npu" travel in a collective: leave it out'
    )
    assert load(tmp_path, {"ExpertMesh": {"device": "npu"}}).exchange == "collective"


def test_a_length_applies_to_keys_that_are_present_only(tmp_path: Path) -> None:
    # MindIE's default maxSeqLen is 2560, below both.
    document = {"ModelDeployConfig": {"maxInputTokenLen": 65000}, "ScheduleConfig": {"maxIterTimes": 9999}}
    config = load(tmp_path, document)
    assert (config.max_input_token_len, config.max_iter_times) == (65000, 9999)
    # A prompt that is longer than maxPrefillTokens is computed in chunks.
    config = load(tmp_path, {**LEVEL_1, "ScheduleConfig": SCHEDULE})
    assert (config.max_input_token_len, config.max_prefill_tokens) == (65000, 8192)


@pytest.mark.parametrize("key", ["ModelDeployConfig", "ScheduleConfig"])
def test_a_section_in_both_places_is_refused(tmp_path: Path, key: str) -> None:
    (sentence,) = problems(tmp_path, {key: {}, "BackendConfig": {key: {}}})
    assert sentence == f"{key} stands at the top level and inside BackendConfig: keep one of them"


def test_a_bad_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_FLEET_PORT", "99999")
    assert problems(tmp_path, LEVEL_2) == [
        "ExpertMesh.fleetPort is 99999 (from EXPERTMESH_FLEET_PORT), but it must be at most 65535"
    ]
    load(tmp_path, LEVEL_2, **{"ExpertMesh.fleetPort": 1})
    monkeypatch.delenv("EXPERTMESH_FLEET_PORT")
    monkeypatch.setenv("EXPERTMESH_WORLD_SIZE", "two")
    (sentence,) = problems(tmp_path, {})
    path = "ModelDeployConfig.ModelConfig[0].worldSize"
    assert sentence == f'{path} is "two" (from EXPERTMESH_WORLD_SIZE), but it must be an integer'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no JSON: "),
        (b"{", "is no JSON: "),
        (b"\xff\xfe\xfd", "is no JSON: "),
        (b"[" * 100000, "is no JSON: "),
        (b"[]", "holds a list with 0 entries, but a configuration is a JSON object"),
        (
            b'{"ExpertMesh": {"fleetPort": 1, "fleetPort": 2}}',
            'the key "fleetPort" stands twice in one object',
        ),
        (b" " * (10 * 2**20 + 1), "has 10485761 bytes, but at most 10485760 are read"),
        (json.dumps({"Version": "\ud800"}).encode(), "the configuration is no valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    (problem,) = caught.value.problems
    assert str(file) in problem
    assert sentence in problem


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.json cannot be read: No such file or directory$"):
        load_config(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="is not an ordinary file"):
        load_config(tmp_path)
