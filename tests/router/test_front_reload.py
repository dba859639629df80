"""ReloadConfig and its sisters over real gRPC, with an engine process that says what it was tuned to."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from protos import admin_pb2 as pb
from tests.fake_engine import AGREES_AND_DIES, DIES_WHEN_ASKED, NEVER_AGREES, REFUSES, SILENT, SLOW
from tests.router.front_fleet import Running, front_config, request_of, running_front
from tests.router.test_front_streams import answer, detail_of

pytestmark = pytest.mark.asyncio


async def document_of(running: Running) -> dict[str, Any]:
    config = await running.admin.GetConfig(pb.GetConfigRequest(), timeout=5)
    document = json.loads(config.config_json)
    assert isinstance(document, dict)
    return document


async def reload(
    running: Running, document: Any, dry_run: bool = False, expected_version: int | None = None
) -> pb.ReloadConfigResponse:
    text = document if isinstance(document, str) else json.dumps(document)
    request = pb.ReloadConfigRequest(config_json=text, dry_run=dry_run, expected_version=expected_version)
    return await running.admin.ReloadConfig(request, timeout=20)


async def with_own(running: Running, **own: Any) -> dict[str, Any]:
    """The document in force with other values in section ExpertMesh."""
    document = await document_of(running)
    document["ExpertMesh"] |= own
    return document


async def with_level(running: Running, ep_level: int, **own: Any) -> dict[str, Any]:
    document = await with_own(running, **own)
    model = document["ModelDeployConfig"]["ModelConfig"][0]
    model["models"] = {"deepseekv2": {"ep_level": ep_level}}
    return document


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def tuning(running: Running, expected: int) -> None:
    """The engine runs steps as 100 * ep_level + micro_batches says."""
    await running.until(lambda status: status.num_steps == expected)


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
        proposed = await with_level(running, 2, groupedMatmul="on")
        response = await reload(running, proposed, dry_run=True)
        assert (response.version, response.applied, len(response.changes)) == (1, False, 2)
        assert list(response.refusals) == []
        assert any("groupedMatmul" in warning for warning in response.warnings)
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


@pytest.mark.parametrize(
    ("micro_batches", "code", "words"),
    [
        (REFUSES, grpc.StatusCode.FAILED_PRECONDITION, "8 parts are too many"),
        (NEVER_AGREES, grpc.StatusCode.UNAVAILABLE, "did not answer within 0.3 s"),
        (DIES_WHEN_ASKED, grpc.StatusCode.UNAVAILABLE, "ended before it had agreed"),
    ],
)
async def test_an_engine_that_does_not_agree_leaves_everything_as_it_was(
    tmp_path: Path, micro_batches: int, code: grpc.StatusCode, words: str
) -> None:
    async with running_front(front_config(tmp_path, 0, stateDir=str(tmp_path / "state"))) as running:
        await running.until_ready()
        running.front.tuning._timeout_s = 0.3
        before = await document_of(running)
        proposed = await with_own(running, microBatches=micro_batches, maxQueuedRequests=5)
        error = await refusal(reload(running, proposed))
        assert error.code() is code
        assert words in (error.details() or "")
        await running.until_ready()
        await tuning(running, 101)
        assert await document_of(running) == before
        assert running.front.config.max_queued_requests == 1000
        assert len(list((tmp_path / "state").glob("config-*.json"))) == 1
        response = await reload(running, await with_own(running, microBatches=2))
        assert response.applied
        await tuning(running, 102)


async def test_an_engine_that_dies_after_it_agreed_comes_back_with_all_of_the_new_configuration(
    tmp_path: Path,
) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        response = await reload(running, await with_level(running, 2, microBatches=AGREES_AND_DIES))
        assert response.applied
        await running.until(lambda status: status.engine_state == "restarting")
        await running.until_ready()
        await tuning(running, 200 + AGREES_AND_DIES)


async def test_an_engine_that_is_started_again_gets_the_configuration_in_force(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        await reload(running, await with_level(running, 2, microBatches=4))
        child = running.front.engine.child
        assert child is not None
        child.kill()
        await running.until(lambda status: status.engine_state == "restarting")
        await running.until_ready()
        await tuning(running, 204)


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


async def test_a_caller_who_leaves_does_not_leave_half_a_change(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        for number in range(2, 5):
            document = json.dumps(await with_own(running, microBatches=number))
            call = running.admin.ReloadConfig(pb.ReloadConfigRequest(config_json=document))
            while running.front.reload._running == set():
                await asyncio.sleep(0)
            call.cancel()
            await tuning(running, 100 + number)
            assert (await running.status()).config_version == number


async def test_sighup_reads_the_file_again_and_an_error_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "config.json"
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, running.front.reread_file)

        async def logged(words: str) -> None:
            async with asyncio.timeout(5):
                while words not in caplog.text:
                    await asyncio.sleep(0.01)

        with caplog.at_level(logging.INFO):
            document = await with_own(running, microBatches=3)
            for text, words in (
                (json.dumps(document)[:-1], "is no JSON"),
                (
                    json.dumps(document | {"ServerConfig": {"port": 0, "managementPort": 9}}),
                    "needs another start",
                ),
                (json.dumps(await with_own(running, microBatches=REFUSES)), "8 parts are too many"),
            ):
                file.write_text(text)
                os.kill(os.getpid(), signal.SIGHUP)
                await logged(words)
                assert (await running.status()).config_version == 1
            file.write_text(json.dumps(document))
            os.kill(os.getpid(), signal.SIGHUP)
            status = await running.until(lambda status: status.config_version == 2)
            assert status.warnings == []
            await tuning(running, 103)
            os.kill(os.getpid(), signal.SIGHUP)
            await logged("holds what is in force already: version 2")
        listed = await running.admin.ListConfigVersions(pb.ListConfigVersionsRequest(), timeout=5)
        assert (listed.versions[0].origin, listed.versions[0].author) == ("file", "SIGHUP")
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


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


async def test_while_the_engine_loads_only_what_does_not_concern_it_can_change(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        loaded = await running.until_ready()
        assert loaded.ready
        child = running.front.engine.child
        assert child is not None
        child.kill()
        await running.until(lambda status: status.engine_state == "restarting")
        error = await refusal(reload(running, await with_own(running, microBatches=4)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "has not loaded yet" in (error.details() or "")
        assert (await reload(running, await with_own(running, maxQueuedRequests=7))).applied


async def test_with_a_state_directory_the_file_wins_at_start_and_the_last_version_is_named(
    tmp_path: Path,
) -> None:
    state = str(tmp_path / "state")
    async with running_front(front_config(tmp_path, 0, stateDir=state)) as running:
        await running.until_ready()
        config = await running.admin.GetConfig(pb.GetConfigRequest(), timeout=5)
        assert (config.version, config.state_dir) == (1, state)
        await reload(running, await with_level(running, 2))
    async with running_front(front_config(tmp_path, 0, stateDir=state)) as running:
        await running.until_ready()
        status = await running.status()
        assert (status.config_version, status.ep_level) == (3, 1)
        assert any("differs from version 2" in warning for warning in status.warnings)
        await running.admin.RollbackConfig(pb.RollbackConfigRequest(version=2), timeout=10)
        await tuning(running, 201)
        (tmp_path / "in-force.json").write_text(json.dumps(await document_of(running)))
    document = json.loads((tmp_path / "in-force.json").read_text())
    same = front_config(tmp_path, 0, stateDir=state)
    (tmp_path / "config.json").write_text(json.dumps(document))
    async with running_front(same.replaced_by(document, "")) as running:
        await running.until_ready()
        status = await running.status()
        assert (status.config_version, status.ep_level, list(status.warnings)) == (4, 2, [])
