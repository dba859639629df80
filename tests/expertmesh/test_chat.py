"""`expertmesh chat` against a server that says the same to everything: turns, history, ends."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from expertmesh.cli.line_input import LineInput
from protos import generation_pb2 as pb
from tests.expertmesh.test_client import Scripted, scripted, serve
from tests.source import ROOT

pytestmark = pytest.mark.asyncio

TIMEOUT_S = 60.0
HISTORY = [
    ("system", "Be brief."),
    ("user", "one"),
    ("assistant", "Yes."),
    ("user", "two"),
]


def yes_sayer() -> Scripted:
    return scripted(
        pb.GenerateResponse(started=pb.Started(prompt_tokens=3, request_id="r")),
        pb.GenerateResponse(chunk=pb.Chunk(token_ids=[5], text="Ye")),
        pb.GenerateResponse(chunk=pb.Chunk(token_ids=[6], text="s.")),
        pb.GenerateResponse(finished=pb.Finished(finish_reason=pb.FINISH_REASON_STOP)),
    )


async def start(target: str, *flags: str, stdin: int) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "expertmesh", "chat", "--target", target, *flags]
    return await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


def said(service: Scripted) -> list[list[tuple[str, str]]]:
    return [[(one.role, one.content) for one in request.chat.messages] for request in service.requests]


@pytest.mark.parametrize("kind", ["pipe", "file"])
async def test_lines_of_standard_input_are_turns_and_the_history_goes_along(
    kind: str, tmp_path: Path
) -> None:
    service = yes_sayer()
    server, target = await serve(service)
    text = b"one\n\n  \r\ntwo"
    (tmp_path / "turns").write_bytes(text)
    with (tmp_path / "turns").open("rb") as file:
        stdin = asyncio.subprocess.PIPE if kind == "pipe" else file.fileno()
        process = await start(
            target, "--system", "Be brief.", "--max-tokens", "9", "--temperature", "0", stdin=stdin
        )
        given = text if kind == "pipe" else None
        output, log = await asyncio.wait_for(process.communicate(given), TIMEOUT_S)
    await server.stop(0)
    assert (process.returncode, output, log) == (0, b"Yes.\nYes.\n", b"")
    assert said(service) == [HISTORY[:2], HISTORY]
    assert service.requests[0].sampling.max_tokens == 9
    assert service.requests[0].sampling.HasField("temperature")


async def test_every_answer_is_one_json_object() -> None:
    server, target = await serve(yes_sayer())
    process = await start(target, "--json", stdin=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(b"one\ntwo\n"), TIMEOUT_S)
    await server.stop(0)
    decoder, rest, answers = json.JSONDecoder(), output.decode(), []
    while rest.strip():
        answer, end = decoder.raw_decode(rest.lstrip())
        answers.append((answer["text"], answer["finish_reason"], answer["request_id"]))
        rest = rest.lstrip()[end:]
    assert answers == [("Yes.", "stop", "r")] * 2


@pytest.mark.parametrize("end", [b"\n", b"\x04"])
async def test_on_a_terminal_an_empty_line_or_ctrl_d_ends_the_conversation(end: bytes) -> None:
    service = yes_sayer()
    server, target = await serve(service)
    terminal, its_end = pty.openpty()
    process = await start(target, stdin=its_end)
    os.close(its_end)
    assert process.stdout is not None
    assert process.stderr is not None
    assert await asyncio.wait_for(process.stderr.readexactly(2), TIMEOUT_S) == b"> "
    os.write(terminal, b"one\n")
    assert await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S) == b"Yes.\n"
    os.write(terminal, end)
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0
    os.close(terminal)
    await server.stop(0)
    assert said(service) == [[("user", "one")]]


async def test_ctrl_c_ends_a_conversation_that_waits_for_its_next_turn() -> None:
    server, target = await serve(yes_sayer())
    terminal, its_end = pty.openpty()
    process = await start(target, stdin=its_end)
    os.close(its_end)
    assert process.stderr is not None
    await asyncio.wait_for(process.stderr.readexactly(2), TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 128 + signal.SIGINT
    os.close(terminal)
    await server.stop(0)


async def test_a_router_that_is_not_there_is_one_sentence() -> None:
    process = await start("127.0.0.1:1", stdin=asyncio.subprocess.PIPE)
    output, log = await asyncio.wait_for(process.communicate(b"one\n"), TIMEOUT_S)
    assert (process.returncode, output) == (1, b"")
    assert log.decode().startswith("expertmesh: nothing listens on 127.0.0.1:1")


async def test_a_line_may_come_in_parts_and_several_at_once() -> None:
    reading, writing = os.pipe()
    lines = LineInput(reading)
    os.write(writing, "a\nbç".encode()[:-1])
    assert await lines.line() == "a"
    later = asyncio.create_task(lines.line())
    await asyncio.sleep(0.05)
    assert not later.done()
    os.write(writing, "ç".encode()[1:] + b"\r\nlast")
    assert await later == "bç"
    os.close(writing)
    assert [await lines.line() for _ in range(3)] == ["last", None, None]
    os.close(reading)
