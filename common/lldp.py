"""What the cable of an NPU leads to, as its neighbour announces over LLDP and Ascend's hccn_tool shows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable

from common.topology import DeviceLink, Link

# The driver's own folder is often not on PATH in a container.
PLACES = ("hccn_tool", "/usr/local/Ascend/driver/tools/hccn_tool")
MAX_OUTPUT_BYTES = 1 << 16
KILL_GRACE_S = 1.0
DESCRIPTION = "System Description TLV"
HEADING = re.compile(r"\S.* TLV\s*\Z")
MAX_SHOWN = 80


class _NoAnswer(Exception):
    """hccn_tool gave no answer; the message is part of a sentence."""


def link_of(output: str) -> tuple[Link, str]:
    """Read the output of `hccn_tool -i N -lldp -g`; say what is at the other end, and by what we know it.

    A switch of Huawei's describes itself as a Versatile Routing Platform, an NPU as an AscendNPU. The
    description may take several lines, up to the next heading.
    """
    lines = iter(output.splitlines())
    if not any(line.strip() == DESCRIPTION for line in lines):
        return Link.UNKNOWN, "its neighbour announces no description"
    words = []
    for line in lines:
        if HEADING.match(line):
            break
        words += line.split()
    description = " ".join(words)
    shown = repr(description if len(description) <= MAX_SHOWN else f"{description[:MAX_SHOWN]}...")
    is_switch, is_npu = "Routing" in description, "AscendNPU" in description
    if is_switch == is_npu:
        return Link.UNKNOWN, f"its neighbour describes itself as {shown}"
    return (Link.SWITCH if is_switch else Link.DIRECT), f"its neighbour describes itself as {shown}"


async def device_links(server: str, devices: Iterable[int], timeout_s: float) -> list[DeviceLink]:
    """Ask hccn_tool about devices of this machine, all at once; what gives no answer in time is unknown."""
    return list(await asyncio.gather(*(_device_link(server, device, timeout_s) for device in devices)))


async def _device_link(server: str, device: int, timeout_s: float) -> DeviceLink:
    try:
        link, reason = link_of(await _ask(device, timeout_s))
    except _NoAnswer as error:
        link, reason = Link.UNKNOWN, str(error)
    return DeviceLink(server, device, link, reason)


async def _ask(device: int, timeout_s: float) -> str:
    program = next((found for place in PLACES if (found := shutil.which(place)) is not None), None)
    if program is None:
        raise _NoAnswer("hccn_tool is not installed")
    command = (program, "-i", str(device), "-lldp", "-g")
    try:
        # A group of its own, so that whatever the tool starts can be ended with it.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise _NoAnswer(f"hccn_tool cannot be started: {error.strerror or error}") from None
    has_ended = False
    try:
        async with asyncio.timeout(timeout_s):
            output = await _read(process)
            status = await process.wait()
        has_ended = True
    except TimeoutError:
        raise _NoAnswer(f"hccn_tool gave no answer within {timeout_s:.1f} s") from None
    finally:
        if not has_ended:
            await _kill(process)
    if status != 0:
        raise _NoAnswer(f"hccn_tool ended with status {status}")
    return output.decode(errors="replace")


async def _read(process: Process) -> bytes:
    output = bytearray()
    while process.stdout is not None and (part := await process.stdout.read(MAX_OUTPUT_BYTES)):
        output += part
        if len(output) > MAX_OUTPUT_BYTES:
            raise _NoAnswer(f"hccn_tool wrote more than {MAX_OUTPUT_BYTES} bytes")
    return bytes(output)


async def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process stuck in the driver cannot be ended, and is not waited for.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), KILL_GRACE_S)
