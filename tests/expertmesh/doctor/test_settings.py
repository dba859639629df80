"""Variables, rank table, two-server rule, token, checkpoint and limits: judgements over made-up facts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from common.config import Config, load_config
from common.preflight import Finding as Checked
from common.rank_table import DeviceRank, RankTable
from common.topology import DeviceLink, Link
from expertmesh.doctor.facts.ranks import RankTableFacts
from expertmesh.doctor.facts.resources import Resources
from expertmesh.doctor.facts.token import TokenFacts
from expertmesh.doctor.finding import Finding, Outcome
from expertmesh.doctor.findings.checkpoint import judge_checkpoint, judge_preflight
from expertmesh.doctor.findings.configuration import judge_configuration
from expertmesh.doctor.findings.ranks import judge_rank_table, judge_two_servers
from expertmesh.doctor.findings.resources import (
    judge_locked_memory,
    judge_memory,
    judge_open_files,
    judge_shared_memory,
)
from expertmesh.doctor.findings.token import judge_token
from expertmesh.doctor.findings.variables import judge_variables

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "enp1": "192.168.0.1"}
GIGABYTE = 1 << 30
PLENTY = Resources(
    memory_bytes=64 * GIGABYTE,
    bound_bytes=None,
    shared_memory_bytes=16 * GIGABYTE,
    open_files=65536,
    locked_bytes=None,
)


def variables(device: str, **environment: str) -> list[Finding]:
    return list(judge_variables(environment, INTERFACES, device))


def of_kind(findings: Iterable[Finding], outcome: Outcome) -> list[Finding]:
    return [one for one in findings if one.outcome is outcome]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("HCCL_BUFFSIZE", ["1", "200", "2048"], ["0", "-1", "200MB", "1.5", "abc", "\uff12"]),
        ("HCCL_CONNECT_TIMEOUT", ["120", "7200"], ["119", "7201", "2m"]),
        ("HCCL_EXEC_TIMEOUT", ["68", "1836"], ["-1", "long"]),
        ("HCCL_IF_IP", ["10.0.0.1", "fe80::1"], ["10.0.0.7", "eth0", "10.0.0"]),
        ("HCCL_IF_BASE_PORT", ["16666"], ["1023", "65521"]),
        (
            "HCCL_SOCKET_IFNAME",
            ["eth", "eth0", "=eth0", "=ib0,eth0", "^docker", "^=lo", "ib,e"],
            ["ib", "=eth", "^eth,enp,lo", "=", "^=lo,eth0,enp1"],
        ),
        ("GLOO_SOCKET_IFNAME", ["eth0", "eth0,enp1"], ["eth", "eth1"]),
        ("ASCEND_RT_VISIBLE_DEVICES", ["0", "0,1,2"], ["0,0", "a", "0,", "all"]),
        ("TORCH_HCCL_ASYNC_ERROR_HANDLING", ["1", "3"], ["4", "on"]),
    ],
)
def test_a_variable_of_hccl_is_good_or_a_failure(name: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        assert [one.outcome for one in variables("npu", **{name: value})] == [Outcome.OK], value
    for value in bad:
        found = of_kind(variables("npu", **{name: value}), Outcome.FAILURE)
        assert [f'{name} is "{value}", but it must' in one.found for one in found] == [True], value


def test_a_bad_variable_that_does_not_act_is_a_warning() -> None:
    [one] = variables("cpu", HCCL_BUFFSIZE="abc")
    assert one.outcome is Outcome.WARNING
    assert variables("cpu")[0].outcome is Outcome.NOT_APPLICABLE
    assert variables("cpu", HCCL_BUFFSIZE="200")[0].outcome is Outcome.NOT_APPLICABLE


@pytest.mark.parametrize("value", ["0,1", "GPU-8f1c", "MIG-1"])
def test_gpus_are_named_by_number_or_uuid(value: str) -> None:
    assert of_kind(variables("cuda", CUDA_VISIBLE_DEVICES=value), Outcome.FAILURE) == []


@pytest.mark.parametrize(
    "environment",
    [
        {"HCCL_EXEC_TIMEOUT": "0"},
        {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"},
        {"HCCL_EXEC_TIMEOUT": "1900"},
        {"HCCL_EXEC_TIMEOUT": "200", "HCCL_EVENT_TIMEOUT": "200"},
        {"HCCL_IF_IP": "10.0.0.1", "HCCL_SOCKET_IFNAME": "eth"},
    ],
)
def test_values_that_are_rarely_meant_are_warnings(environment: dict[str, str]) -> None:
    assert len(of_kind(variables("npu", **environment), Outcome.WARNING)) == 1


def two_servers() -> RankTable:
    return RankTable(
        tuple(
            DeviceRank(server * 2 + device, f"10.0.0.{server}", device, f"192.168.{server}.{device}", "c")
            for server in range(2)
            for device in range(2)
        )
    )


def cables(link: Link, server: str) -> list[DeviceLink]:
    return [DeviceLink(server, device, link, "its neighbour says so") for device in range(2)]


def test_a_rank_table_must_be_right_and_have_this_machine() -> None:
    table = two_servers()
    assert judge_rank_table(RankTableFacts(), 4).outcome is Outcome.NOT_APPLICABLE
    assert judge_rank_table(RankTableFacts("f", "f: status is wrong"), 4).outcome is Outcome.FAILURE
    assert judge_rank_table(RankTableFacts("f", "", table, None), 4).outcome is Outcome.WARNING
    assert judge_rank_table(RankTableFacts("f", "", table, "10.0.0.0"), 8).outcome is Outcome.WARNING
    good = judge_rank_table(RankTableFacts("f", "", table, "10.0.0.0"), 4)
    assert (good.outcome, good.found) == (Outcome.OK, "4 ranks on 2 servers; this machine is 10.0.0.0")


@pytest.mark.parametrize(
    ("ep_level", "topology", "links", "outcome"),
    [
        (1, "auto", cables(Link.DIRECT, "10.0.0.0"), Outcome.NOT_APPLICABLE),
        (2, "auto", cables(Link.DIRECT, "10.0.0.0"), Outcome.FAILURE),
        (2, "auto", cables(Link.SWITCH, "10.0.0.0"), Outcome.WARNING),
        (2, "auto", cables(Link.SWITCH, "10.0.0.0") + cables(Link.SWITCH, "10.0.0.1"), Outcome.OK),
        (2, "auto", [], Outcome.WARNING),
        (2, "switch", [], Outcome.OK),
        (2, "direct", [], Outcome.FAILURE),
    ],
)
def test_two_servers_at_ep_level_2_need_a_switch(
    ep_level: int, topology: str, links: list[DeviceLink], outcome: Outcome
) -> None:
    found = judge_two_servers(ep_level, topology, two_servers(), links, is_mesh=True)
    assert found.outcome is outcome, found


def config(**own: Any) -> Config:
    return load_config(None, {f"ExpertMesh.{key}": value for key, value in own.items()})


@pytest.mark.parametrize(
    ("facts", "is_worker", "outcome"),
    [
        (TokenFacts(), False, Outcome.NOT_APPLICABLE),
        (TokenFacts(), True, Outcome.FAILURE),
        (TokenFacts("f", "cannot be read"), False, Outcome.FAILURE),
        (TokenFacts("f", "", 0o644, 64), False, Outcome.WARNING),
        (TokenFacts("f", "", 0o400, 4), False, Outcome.WARNING),
        (TokenFacts("f", "", 0o400, 64), True, Outcome.OK),
    ],
)
def test_the_fleet_token_is_there_and_a_secret(facts: TokenFacts, is_worker: bool, outcome: Outcome) -> None:
    assert judge_token(facts, config(), is_worker=is_worker).outcome is outcome


def test_experts_in_process_need_no_token() -> None:
    found = judge_token(TokenFacts(), config(expertsInProcess=True), is_worker=False)
    assert found.outcome is Outcome.NOT_APPLICABLE


WHOLE = {"num_tensors": 9, "num_files": 2, "num_bytes": 10**9, "missing": [], "num_missing": 0}


@pytest.mark.parametrize(
    ("answer", "is_there", "has_tokenizer", "outcomes"),
    [
        (WHOLE, True, True, [Outcome.OK]),
        (WHOLE, True, False, [Outcome.OK, Outcome.WARNING]),
        (WHOLE | {"missing": ["lm_head.weight"], "num_missing": 1}, True, True, [Outcome.FAILURE]),
        ({"error": "m is truncated"}, True, True, [Outcome.FAILURE]),
        ({"error": "m cannot be read: Permission denied"}, True, True, [Outcome.FAILURE]),
        ({}, False, False, [Outcome.FAILURE]),
    ],
)
def test_a_checkpoint_is_there_and_complete(
    answer: dict[str, Any], is_there: bool, has_tokenizer: bool, outcomes: list[Outcome]
) -> None:
    model = Path("m")
    found = judge_checkpoint(model, answer, is_there=is_there, is_worker=False, has_tokenizer=has_tokenizer)
    assert [one.outcome for one in found] == outcomes


@pytest.mark.parametrize(("is_worker", "outcome"), [(True, Outcome.NOT_APPLICABLE), (False, Outcome.FAILURE)])
def test_a_router_needs_a_checkpoint_and_a_worker_may_be_told(is_worker: bool, outcome: Outcome) -> None:
    found = judge_checkpoint(None, {}, is_there=False, is_worker=is_worker, has_tokenizer=False)
    assert [one.outcome for one in found] == [outcome]


def test_what_the_services_would_refuse_before_loading_is_a_failure() -> None:
    met, unmet = (Checked("moe_ep", "a divisor of 24", found, found == "2", "choose 2") for found in "27")
    assert list(judge_preflight([])) == []
    good, bad = judge_preflight([met, unmet])
    assert (good.outcome, bad.outcome) == (Outcome.OK, Outcome.FAILURE)
    assert (bad.found, bad.remedy) == ("moe_ep is 7, but a divisor of 24 is needed: choose 2", "choose 2")


def test_every_bad_value_of_a_configuration_is_a_failure() -> None:
    found = judge_configuration(None, "f", ("a is wrong", "b is wrong"))
    assert [one.found for one in found] == ["a is wrong", "b is wrong"]
    assert [one.outcome for one in judge_configuration(config(), "f", ())] == [Outcome.OK]


def test_memory_is_that_of_the_machine_or_of_the_container() -> None:
    [one] = judge_memory(PLENTY, GIGABYTE, 2 * GIGABYTE, is_worker=False)
    assert one.outcome is Outcome.OK
    bound = Resources(64 * GIGABYTE, 2 * GIGABYTE, None, None, None)
    [one] = judge_memory(bound, GIGABYTE, 2 * GIGABYTE, is_worker=False)
    assert one.outcome is Outcome.WARNING
    assert "within this container's bound" in one.found
    [one] = judge_memory(Resources(None, None, None, None, None), 1, 1, is_worker=False)
    assert one.outcome is Outcome.NOT_APPLICABLE
    [one] = judge_memory(bound, GIGABYTE, 2 * GIGABYTE, is_worker=True)
    assert one.outcome is Outcome.NOT_APPLICABLE


def test_limits_matter_where_they_act() -> None:
    small = Resources(None, None, 64 << 20, 40, 64 << 10)
    assert judge_shared_memory(small, "npu").outcome is Outcome.WARNING
    assert judge_shared_memory(small, "cpu").outcome is Outcome.NOT_APPLICABLE
    assert judge_shared_memory(PLENTY, "npu").outcome is Outcome.OK
    assert judge_locked_memory(small, "cuda").outcome is Outcome.WARNING
    assert judge_locked_memory(PLENTY, "cuda").outcome is Outcome.OK
    assert judge_open_files(small, config()).outcome is Outcome.FAILURE
    assert judge_open_files(Resources(None, None, None, 512, None), config()).outcome is Outcome.WARNING
    assert judge_open_files(PLENTY, config()).outcome is Outcome.OK
    assert judge_open_files(Resources(None, None, None, None, None), None).outcome is Outcome.OK
