"""The admin client and `expertmesh config` against a real admin service; its engine only counts."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import NotReady, ReloadRefused, RequestError, VersionConflict, VersionUnknown
from expertmesh.admin_client import AdminClient
from tests.fake_engine import DIES_WHEN_ASKED, REFUSES
from tests.router.front_fleet import Running, front_config, running_front
from tests.source import ROOT

pytestmark = pytest.mark.asyncio


async def edited(client: AdminClient, **own: Any) -> str:
    document = json.loads((await client.config()).config_json)
    document["ExpertMesh"] |= own
    return json.dumps(document)


async def test_every_refusal_becomes_its_own_error(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        async with AdminClient(running.addresses["admin"]) as client:
            with pytest.raises(RequestError) as bad:
                await client.reload(await edited(client, microBatches=0))
            assert bad.value.field == "ExpertMesh.microBatches"
            with pytest.raises(ReloadRefused) as cold:
                await client.reload(await edited(client, threads=2, dtype="bfloat16"))
            assert set(cold.value.refusals) == {"ExpertMesh.threads", "ExpertMesh.dtype"}
            with pytest.raises(ReloadRefused, match="8 parts are too many"):
                await client.reload(await edited(client, microBatches=REFUSES))
            with pytest.raises(VersionConflict, match="version 1 is in force"):
                await client.reload(await edited(client, microBatches=2), expected_version=4)
            with pytest.raises(VersionUnknown, match="version 9 is not kept"):
                await client.roll_back(9)
            with pytest.raises(NotReady, match="ended before it had agreed"):
                await client.reload(await edited(client, microBatches=DIES_WHEN_ASKED))


async def test_a_version_is_applied_listed_and_rolled_back(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        async with AdminClient(running.addresses["admin"]) as client:
            proposed = await edited(client, microBatches=2)
            assert not (await client.reload(proposed, dry_run=True)).applied
            assert (await client.reload(proposed, expected_version=1)).version == 2
            assert (await client.roll_back(1, expected_version=2)).version == 3
            assert [one.version for one in await client.versions()] == [3, 2, 1]


class Terminal:
    """Runs `expertmesh config ... --admin` as people do."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.admin = running.addresses["admin"]
        self.folder = folder

    async def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "expertmesh", "config", *map(str, arguments), "--admin", self.admin]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, cwd=ROOT)
        out, err = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode or 0, out.decode(), err.decode()

    def write(self, document: Any) -> Path:
        file = self.folder / "edited.json"
        file.write_text(json.dumps(document))
        return file


async def test_show_edit_diff_apply_history_rollback(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0, stateDir=str(tmp_path / "state"))) as running:
        await running.until_ready()
        terminal = Terminal(running, tmp_path)
        status, out, err = await terminal.run("show")
        document = json.loads(out)
        assert (status, document) == (0, json.loads((tmp_path / "config.json").read_text()))
        assert f"version 1; versions are kept in {tmp_path / 'state'}" in err
        document["ExpertMesh"] |= {"microBatches": 2}
        file = terminal.write(document)
        for command, *options in (("diff",), ("apply", "--dry-run")):
            status, out, err = await terminal.run(command, file, *options)
            assert (status, err) == (0, "")
            assert out == "ExpertMesh.microBatches: 1 -> 2  (hot)\nversion 1 is in force; 1 value differs\n"
        status, out, _ = await terminal.run("apply", file, "--expect-version", "1", "--json")
        applied = json.loads(out)
        assert (status, applied["version"], applied["applied"]) == (0, 2, True)
        assert applied["changes"][0]["path"] == "ExpertMesh.microBatches"
        status, out, _ = await terminal.run("rollback", "1")
        assert out.splitlines() == [
            "ExpertMesh.microBatches: 2 -> 1  (hot)",
            "version 3 is now in force; 1 value differs",
        ]
        status, out, _ = await terminal.run("history")
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == ["version", "3", "2", "1"]
        assert "in force" in lines[1]
        assert "rollback to 1" in lines[1]
        status, out, _ = await terminal.run("history", "--json")
        assert [one["origin"] for one in json.loads(out)] == ["rollback to 1", "reload", "file"]
        status, out, _ = await terminal.run("show", "--json")
        assert json.loads(out)["effective_json"]["micro_batches"] == 1


async def test_what_cannot_be_applied_is_a_sentence_and_exit_status_two(tmp_path: Path) -> None:
    async with running_front(front_config(tmp_path, 0)) as running:
        await running.until_ready()
        terminal = Terminal(running, tmp_path)
        document = json.loads((tmp_path / "config.json").read_text())
        cold = terminal.write(document | {"ExpertMesh": {**document["ExpertMesh"], "threads": 3}})
        status, out, _ = await terminal.run("diff", cold)
        assert status == 0
        assert "ExpertMesh.threads: null -> 3  (restart)" in out
        assert "refused: ExpertMesh.threads is null and would become 3" in out
        status, out, _ = await terminal.run("apply", cold, "--dry-run")
        assert (status, "refused: ExpertMesh.threads" in out) == (2, True)
        status, out, err = await terminal.run("apply", cold)
        assert (status, out) == (2, "")
        assert err.startswith("expertmesh: ExpertMesh.threads is null and would become 3, but that needs")
        wrong = terminal.write(document | {"ExpertMesh": {"microBatches": 99}})
        status, out, err = await terminal.run("apply", wrong)
        assert (status, out) == (2, "")
        assert "ExpertMesh.microBatches is 99, but it must be at most 8" in err
        wrong.write_text("{")
        status, _, err = await terminal.run("apply", wrong)
        assert (status, f"{wrong} is no JSON" in err) == (2, True)
        status, _, err = await terminal.run("rollback", "7")
        assert (status, "version 7 is not kept" in err) == (2, True)
        status, _, err = await terminal.run("apply", terminal.write(document), "--expect-version", "5")
        assert (status, "version 1 is in force" in err) == (1, True)
