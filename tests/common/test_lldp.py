"""What an NPU is connected to: hccn_tool's output, and a tool that fails, floods or hangs."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import lldp
from common.lldp import device_links, link_of
from common.topology import DeviceLink, Link

SWITCH = """\
Chassis ID TLV
        MAC: 00:00:5e:00:53:01
Port ID TLV
        Ifname: 400GE1/1/20:2
System Name TLV
        AscendNPU-rack
System Description TLV
        DX511
Huawei Versatile Routing Platform Software
VRP (R) software, Version 8.211 (DX511 V200R021C10SPC600)

System Capabilities TLV
        Enabled capabilities: Bridge, Router
End of LLDPDU TLV
"""
DIRECT = """\
Chassis ID TLV
        MAC: 00:00:5e:00:53:02
System Description TLV
        AscendNPU
Management Address TLV
        Routing: none
"""


def test_a_neighbour_that_is_a_routing_platform_is_a_switch() -> None:
    link, reason = link_of(SWITCH)
    assert link is Link.SWITCH
    assert "DX511 Huawei Versatile Routing Platform Software" in reason
    assert "Bridge" not in reason


def test_a_neighbour_that_is_an_npu_is_a_direct_cable() -> None:
    assert link_of(DIRECT) == (Link.DIRECT, "its neighbour describes itself as 'AscendNPU'")
    assert link_of(DIRECT.replace("\n", "\r\n"))[0] is Link.DIRECT


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "announces no description"),
        ("get lldp failed\n", "announces no description"),
        (SWITCH.replace("System Description TLV", "Port Description TLV"), "announces no description"),
        (
            "System Description TLV\n        Some OS 1.0\nEnd of LLDPDU TLV\n",
            "describes itself as 'Some OS 1.0'",
        ),
        ("System Description TLV", "describes itself as ''"),
        ("System Description TLV\n AscendNPU Routing\n", "describes itself as 'AscendNPU Routing'"),
    ],
)
def test_anything_else_is_unknown_with_a_reason(output: str, reason: str) -> None:
    link, found = link_of(output)
    assert link is Link.UNKNOWN
    assert reason in found


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*SWITCH.splitlines(), "AscendNPU", "\x00", ""])).map("\n".join))
def test_any_output_is_read_and_told_on_one_line(output: str) -> None:
    _, reason = link_of(output)
    assert reason.isprintable()
    assert len(reason) < 400


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test writes its hccn_tool; the machine's own is not seen."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(lldp, "PLACES", ("hccn_tool",))
    return tmp_path / "hccn_tool"


def write(tool: Path, script: str, interpreter: str = "/bin/sh") -> None:
    tool.write_text(f"#!{interpreter}\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.asyncio
async def test_every_device_is_asked_for_its_own_neighbour(tool: Path, tmp_path: Path) -> None:
    (tmp_path / "switch").write_text(SWITCH)
    (tmp_path / "direct").write_text(DIRECT)
    write(
        tool,
        f'cd {tmp_path}; echo "$*" >> asked\n'
        'case "$*" in "-i 0 -lldp -g") cat switch;; "-i 5 -lldp -g") cat direct;; *) echo nothing;; esac',
    )
    found = await device_links("10.0.0.1", [0, 5, 7], 30.0)
    assert [(one.server, one.device, one.link) for one in found] == [
        ("10.0.0.1", 0, Link.SWITCH),
        ("10.0.0.1", 5, Link.DIRECT),
        ("10.0.0.1", 7, Link.UNKNOWN),
    ]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == ["-i 0 -lldp -g", "-i 5 -lldp -g", "-i 7 -lldp -g"]


@pytest.mark.asyncio
async def test_without_the_tool_the_link_is_unknown(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tool.parent))
    assert await device_links("s", [3], 30.0) == [
        DeviceLink("s", 3, Link.UNKNOWN, "hccn_tool is not installed")
    ]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo System Description TLV; echo AscendNPU; exit 3", "hccn_tool ended with status 3"),
        ("yes", "hccn_tool wrote more than 65536 bytes"),
        (
            r"printf 'System Description TLV\n\377\376 OS\n'",
            "its neighbour describes itself as '\ufffd\ufffd OS'",
        ),
    ],
)
@pytest.mark.asyncio
async def test_a_tool_that_fails_or_floods_leaves_the_link_unknown(
    tool: Path, script: str, reason: str
) -> None:
    write(tool, script)
    assert await device_links("s", [0], 30.0) == [DeviceLink("s", 0, Link.UNKNOWN, reason)]


@pytest.mark.asyncio
async def test_a_file_that_is_no_program_leaves_the_link_unknown(tool: Path) -> None:
    write(tool, "", interpreter="/no/such/interpreter")
    (found,) = await device_links("s", [0], 30.0)
    assert found.link is Link.UNKNOWN
    assert "cannot be started" in found.reason


@pytest.mark.parametrize("script", ["sleep 600", "sleep 600 & echo $! >> {pids}; exit 0"])
@pytest.mark.asyncio
async def test_a_tool_that_hangs_is_ended_at_the_deadline_with_all_it_started(
    tool: Path, tmp_path: Path, script: str
) -> None:
    pids = tmp_path / "pids"
    write(tool, f"echo $$ >> {pids}; " + script.format(pids=pids))
    start = time.monotonic()
    found = await device_links("s", [0, 1], 1.5)
    waited = time.monotonic() - start
    assert {(one.link, one.reason) for one in found} == {
        (Link.UNKNOWN, "hccn_tool gave no answer within 1.5 s")
    }
    assert 1.5 <= waited < 20.0
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 2
    assert still_running(started) == []


def still_running(pids: list[int]) -> list[int]:
    """Which processes are there after all: a killed one takes a moment to be gone."""
    deadline = time.monotonic() + 10.0
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
