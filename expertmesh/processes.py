"""Starts the services as child processes of this one, and ends them, whatever happens to this one.

Children share a lifeline: the read end of a pipe whose write end only this process holds. However this
process ends, SIGKILL included, the kernel closes it, and a child that sees the end of its lifeline exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

STOP_GRACE_S = 8.0
KEPT_LINES = 40
MAX_LINE_BYTES = 1 << 20

OnLine = Callable[[str, str], None]
"""Called with a service's name and one line of its log."""


class Service:
    """One running child. Its stdout is read line by line; its log, stderr, goes to `on_line`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = process
        self._on_line = on_line
        self._log = asyncio.ensure_future(self._read_log())

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.returncode is None

    async def read_line(self) -> str | None:
        """The next line of the child's stdout; None at its end."""
        if self._process.stdout is None:
            return None
        line = await self._process.stdout.readline()
        return line.decode(errors="replace").rstrip() if line else None

    async def wait(self) -> int:
        """Wait for the child's end and for the last line of its log; return the exit status."""
        status = await self._process.wait()
        # A grandchild that is still ending holds the log open; what it says by then is not worth waiting for.
        await asyncio.wait([self._log], timeout=1.0)
        return status

    def why(self) -> str:
        """The child's own last words, or how it ended."""
        status = self._process.returncode
        how = (
            f"was ended by {signal.Signals(-status).name}"
            if status and status < 0
            else f"exited with {status}"
        )
        words = next((line for line in reversed(self.last_lines) if line.strip()), "")
        return f"{self.name} {how}: {words}" if words else f"{self.name} {how} without a word"

    def terminate(self) -> None:
        """Ask the child to end."""
        if self.is_running:
            # Not the process object's own terminate: it polls first, and may take the exit status away from
            # whoever waits for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the child and what it started in its process group, at once."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Ask the child to end, and end it after `grace_s`."""
        self.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
        await self.wait()

    async def _read_log(self) -> None:
        if self._process.stderr is None:
            return
        while line := await self._process.stderr.readline():
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            self._on_line(self.name, text)


class Processes:
    """All services of one fleet on this machine. Leaving the `async with` stops them."""

    def __init__(self, on_line: OnLine, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is what every service gets beside this process's own variables."""
        self._on_line = on_line
        self.environment = {**os.environ, **(environment or {})}
        self._services: dict[str, Service] = {}
        self._lifeline, self._held_end = os.pipe()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(
        self, name: str, module: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> Service:
        """Start `python -m module ARGUMENTS --lifeline-fd N` in its own session.

        `environment` is what it gets beside that of all services.
        In its own session, so that Ctrl-C on a terminal reaches this process only; it ends the others.
        """
        command = [sys.executable, "-m", module, *map(str, arguments), "--lifeline-fd", str(self._lifeline)]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **(environment or {})},
            pass_fds=(self._lifeline,),
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        self._services[name] = Service(name, process, self._on_line)
        return self._services[name]

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End the service that was started first, then the others: a router ends before its workers."""
        services = list(self._services.values())
        try:
            for service in services[:1]:
                await service.stop(grace_s)
            await asyncio.gather(*(service.stop(grace_s) for service in services[1:]))
        finally:
            for service in services:
                service.kill()
            self._close_lifeline()

    def _close_lifeline(self) -> None:
        for fd in (self._lifeline, self._held_end):
            if fd >= 0:
                os.close(fd)
        self._lifeline = self._held_end = -1


def new_token() -> str:
    """A random token for a fleet that lives as long as this process."""
    return secrets.token_urlsafe(32)
