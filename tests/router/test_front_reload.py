"""ReloadConfig and its sisters over real gRPC, with an engine process that says what it was tuned to."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from protos import admin_pb2 as pb
from tests.fake_engine import REFUSES, SILENT, SLOW
from tests.router.front_fleet import front_config, request_of, running_front
from tests.router.reloading import document_of, refusal, reload, tuning, with_level, with_own
from tests.router.test_front_streams import answer, detail_of

pytestmark = pytest.mark.asyncio


async def test_a_reload_reaches_the_engine_the_status_and_the_history(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        await tuning(running, 101)
        before = await running.admin.GetConfig(pb.GetConfigRequest(), timeout=5)
        assert before.version == 1
        assert json.loads(before.config_json) == json.loads((tmp_path / "config.json").read_text())
        assert json.loads(before.effective_json)["ep_level"] == 1
        assert before.state_dir == ""
        response = await reload(running, await with_level(running, 2, microBatches=3), expected_version=1)
        assert (response.version, response.applied) == (2, True)
        assert [(change.path, change.old_json, change.new_json) for change in response.changes] == [
            ("ModelDeployConfig.ModelConfig[0].models.deepseekv2.ep_level", "1", "2"),
            ("ExpertMesh.microBatches", "1", "3"),
        ]
        assert {change.reload_class for change in response.changes} == {"hot"}
        await tuning(running, 203)
        status = await running.status()
        assert (status.config_version, status.ep_level) == (2, 2)
        assert any("holds another configuration" in warning for warning in status.warnings)
        listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
        assert [(one.version, one.in_force, one.origin) for one in listed.versions] == [
            (2, True, "reload"),
            (1, False, "file"),
        ]
        assert listed.versions[0].author.startswith("ipv4:127.0.0.1:")
        assert listed.versions[1].author == "start"


async def test_what_getconfig_returns_can_be_sent_back_and_changes_nothing(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        response = await reload(running, await document_of(running))
        assert (response.version, response.applied, list(response.changes)) == (1, False, [])


async def test_a_dry_run_says_everything_and_changes_nothing(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        before = await document_of(running)
        proposed = await with_level(running, 2, cutoffMinRows=64)
        response = await reload(running, proposed, dry_run=True)
        assert (response.version, response.applied, len(response.changes)) == (1, False, 2)
        assert list(response.refusals) == []
        assert any("cutoffMinRows" in warning for warning in response.warnings)
        cold = await reload(running, await with_own(running, threads=2, microBatches=2), dry_run=True)
        assert {change.path: change.reload_class for change in cold.changes} == {
            "ExpertMesh.threads": "restart",
            "ExpertMesh.microBatches": "hot",
        }
        assert len(cold.refusals) == 1
        refused = await reload(running, await with_own(running, microBatches=REFUSES), dry_run=True)
        assert list(refused.refusals) == ["the engine refuses: 8 parts are too many"]
        assert await document_of(running) == before
        assert (await running.status()).config_version == 1
        # A later commit does not bring back what a dry run had proposed.
        await reload(running, await with_own(running, microBatches=2))
        await tuning(running, 102)


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        ("{", ["config_json"], "no JSON"),
        ("[]", ["config_json"], "must be a JSON object"),
        ('{"a": 1, "a": 2}', ["config_json"], "stands twice"),
        ('{"ExpertMesh": {"microBatches": 9}}', ["ExpertMesh.microBatches"], "at most 8"),
        ('{"ExpertMesh": {"unknown": 9}}', ["ExpertMesh.unknown"], "no key of its section"),
        (
            '{"ExpertMesh": {"threads": 0}, "ModelDeployConfig": {"maxSeqLen": 8, "maxInputTokenLen": 9}}',
            ["ExpertMesh.threads", "ModelDeployConfig.maxInputTokenLen"],
            "at least 1",
        ),
    ],
)
async def test_a_bad_document_is_refused_with_the_json_path_of_every_bad_value(
    tmp_path: Path, text: str, fields: list[str], words: str
) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        error = await refusal(reload(running, text))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        detail = detail_of(error, error_details_pb2.BadRequest)
        assert [violation.field for violation in detail.field_violations] == fields
        assert words in (error.details() or "")
        assert (await running.status()).config_version == 1


async def test_cold_keys_are_refused_by_name_with_what_would_be_needed(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        document = await with_own(running, threads=2, microBatches=2)
        document["ModelDeployConfig"]["maxSeqLen"] = 32
        error = await refusal(reload(running, document))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        detail = detail_of(error, error_details_pb2.PreconditionFailure)
        needs = {violation.subject: violation.description for violation in detail.violations}
        assert set(needs) == {"ExpertMesh.threads", "ModelDeployConfig.maxSeqLen"}
        assert "router and its expert workers" in needs["ExpertMesh.threads"]
        assert "running requests to finish" in needs["ModelDeployConfig.maxSeqLen"]
        for path in needs:
            assert path in (error.details() or "")
        status = await running.status()
        assert (status.config_version, status.num_steps) == (1, 101)


async def test_of_two_reloads_that_expect_the_same_version_one_is_aborted(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        documents = [await with_own(running, microBatches=number) for number in (2, 3, 4)]
        outcomes = await asyncio.gather(
            *(reload(running, document, expected_version=1) for document in documents), return_exceptions=True
        )
        applied = [one for one in outcomes if isinstance(one, pb.ReloadConfigResponse)]
        failed = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
        assert [one.version for one in applied] == [2]
        assert {one.code() for one in failed} == {grpc.StatusCode.ABORTED}
        assert "version 2 is in force, but version 1 was expected" in str(failed[0].details())


async def test_concurrent_reloads_take_turns_and_each_gets_its_version(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        documents = [
            await with_own(running, microBatches=number % 4 + 1, maxQueuedRequests=number)
            for number in range(1, 13)
        ]
        responses = await asyncio.gather(*(reload(running, document) for document in documents))
        assert sorted(response.version for response in responses) == list(range(2, 14))
        last = max(zip(responses, documents, strict=True), key=lambda pair: pair[0].version)[1]
        assert await document_of(running) == last
        await tuning(running, 100 + last["ExpertMesh"]["microBatches"])


async def test_what_only_the_front_needs_acts_from_the_next_request_on(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        document = await with_own(running, maxQueuedRequests=1, drainTimeoutSeconds=3.5)
        document["ScheduleConfig"] = {"maxIterTimes": 3}
        document["ModelDeployConfig"] |= {"maxInputTokenLen": 4, "truncation": 1}
        document["ModelDeployConfig"]["ModelConfig"][0]["modelName"] = "another"
        stream = asyncio.create_task(answer(running, request_of([SLOW], max_tokens=10, ignore_eos=True)))
        async with asyncio.timeout(5):
            while len(running.front.journal) == 0 or running.front.journal.num_waiting > 0:
                await asyncio.sleep(0.01)
        assert (await reload(running, document)).applied
        events = await answer(running, request_of([30, 31, 32, 33, 34, 35], ignore_eos=True))
        assert events[0].started.prompt_tokens == 4
        assert events[-1].finished.usage.completion_tokens == 3
        assert (await running.status()).model_name == "another"
        assert running.front.config.drain_timeout_s == 3.5
        # What was taken in before keeps what it got.
        assert (await stream)[-1].finished.usage.completion_tokens == 10
        waiting = asyncio.create_task(answer(running, request_of([SILENT])))
        while running.front.journal.num_waiting == 0:
            await asyncio.sleep(0.01)
        error = await refusal(answer(running, request_of([20])))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        waiting.cancel()


async def test_the_log_level_changes_at_once(tmp_path: Path) -> None:
    before = logging.getLogger().level
    try:
        async with running_front(front_config(tmp_path, 0)) as running:
            await reload(running, await with_own(running, logLevel="error"))
            assert logging.getLogger().level == logging.ERROR
            await reload(running, await with_own(running, logLevel="debug"))
            assert logging.getLogger().level == logging.DEBUG
    finally:
        logging.getLogger().setLevel(before)


async def test_a_rollback_is_a_new_version_with_an_old_document(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        first = await document_of(running)
        await reload(running, await with_level(running, 2))
        response = await running.admin.RollbackConfig(pb.RollbackConfigRequest(version=1), timeout=10)
        assert (response.version, response.applied) == (3, True)
        assert [change.new_json for change in response.changes] == ["1"]
        assert await document_of(running) == first
        await tuning(running, 101)
        assert (await running.status()).warnings == []
        listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
        assert [one.origin for one in listed.versions] == ["rollback to 1", "reload", "file"]
        assert listed.versions[0].content_hash == listed.versions[2].content_hash
        error = await refusal(running.admin.RollbackConfig(pb.RollbackConfigRequest(version=9), timeout=5))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "these are: 1, 2, 3" in (error.details() or "")
        request = pb.RollbackConfigRequest(version=2, expected_version=1)
        error = await refusal(running.admin.RollbackConfig(request, timeout=5))
        assert error.code() is grpc.StatusCode.ABORTED


async def test_what_the_environment_sets_wins_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_MICRO_BATCHES", "2")
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        response = await reload(running, await with_own(running, microBatches=4))
        assert (response.applied, list(response.changes)) == (True, [])
        assert any(
            "ExpertMesh.microBatches is set by EXPERTMESH_MICRO_BATCHES" in one for one in response.warnings
        )
        await tuning(running, 102)
