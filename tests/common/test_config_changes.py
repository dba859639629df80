"""What differs between two configurations, and what a change of each key would need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import GIGABYTE, MARKS, Effective, resolve
from common.config_changes import Change, changes_between
from common.reload_class import HOT
from tests.common.config_examples import LEVEL_2, changed, completed, write

MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"


def changes_of(folder: Path, old: Any, new: Any) -> list[Change]:
    before = resolve(write(folder, old))
    after = before.replaced_by(new, "")
    return changes_between(before.config, after.config, after.paths)


def test_a_hot_change_has_its_path_both_values_and_no_refusal(tmp_path: Path) -> None:
    new = completed(changed("EP.ep_level", 1))
    (change,) = changes_of(tmp_path, completed(LEVEL_2), new)
    assert (change.path, change.old_json, change.new_json) == (
        f"{MODEL}.models.deepseekv2.ep_level",
        "2",
        "1",
    )
    assert (change.reload.name, change.refusal) == ("hot", "")


def test_what_would_be_needed_is_part_of_the_refusal(tmp_path: Path) -> None:
    (port,) = changes_of(tmp_path, {}, {"ServerConfig": {"port": 7}})
    assert port.refusal == (
        "ServerConfig.port is 1025 and would become 7, but that needs another start of the router: stop it "
        "and start it with the new value"
    )
    size = {"ModelDeployConfig": {"ModelConfig": [{"worldSize": 4}]}}
    changes = changes_of(tmp_path, {}, size)
    assert {change.field: change.new_json for change in changes} == {"world_size": "4", "moe_ep": "4"}
    assert all("router and its expert workers" in change.refusal for change in changes)


def test_values_are_shown_as_in_the_file_and_a_default_counts_as_its_value(tmp_path: Path) -> None:
    document = {"ModelDeployConfig": {"ModelConfig": [{"cpuMemSize": 0.1}]}}
    (memory,) = changes_of(tmp_path, {}, document)
    assert (memory.old_json, memory.new_json, memory.reload.name) == ("1.0", "0.1", "drain")
    assert changes_of(tmp_path, {}, {"ServerConfig": {"port": 1025}}) == []
    assert changes_of(tmp_path, {}, {"ModelDeployConfig": {"ModelConfig": [{"cpuMemSize": 1}]}}) == []


def test_addresses_that_follow_another_change_with_it(tmp_path: Path) -> None:
    changes = changes_of(tmp_path, {}, {"ExpertMesh": {"dataAddress": "127.0.0.2"}})
    assert [change.field for change in changes] == ["fleet_host", "data_address", "agent_host"]


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Effective:
    return resolve(write(tmp_path_factory.mktemp("config"), {}))


OWN = st.fixed_dictionaries(
    {},
    optional={
        "microBatches": st.integers(1, 8),
        "threads": st.integers(1, 4),
        "logLevel": st.sampled_from(["debug", "info"]),
        "deadlineFloorSeconds": st.floats(0.1, 60),
        "fleetPort": st.integers(0, 65535),
    },
)


@settings(max_examples=60, deadline=None)
@given(old=OWN, new=OWN)
def test_taking_every_change_turns_one_configuration_into_the_other(
    nothing: Effective, old: dict[str, Any], new: dict[str, Any]
) -> None:
    before = nothing.replaced_by({"ExpertMesh": old}, "").config
    after = nothing.replaced_by({"ExpertMesh": new}, "")
    changes = changes_between(before, after.config, after.paths)
    values = {change.field: json.loads(change.new_json) for change in changes}
    assert before.model_copy(update=values) == after.config
    assert all(json.loads(change.old_json) == getattr(before, change.field) for change in changes)
    assert all((change.refusal == "") == (MARKS[change.field].reload is HOT) for change in changes)


def test_a_byte_of_the_cache_is_a_change_that_is_seen(nothing: Effective) -> None:
    config = nothing.config.model_copy(update={"kv_cache_bytes": GIGABYTE + 1})
    (change,) = changes_between(nothing.config, config, nothing.paths)
    assert change.old_json != change.new_json


def test_another_document_keeps_the_environment_and_leaves_what_was_given_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_MICRO_BATCHES", "3")
    document = {"ExpertMesh": {"microBatches": 2}}
    before = resolve(write(tmp_path, document), {"ServerConfig.port": 9})
    assert (before.config.micro_batches, before.config.port, before.document) == (3, 9, document)
    after = before.replaced_by({"ServerConfig": {"port": 8}}, "")
    assert (after.config.micro_batches, after.config.port) == (3, 9)
    assert after.document == {"ServerConfig": {"port": 8}}
