"""A service's child: a plain subprocess at the other end of a channel, which its parent can kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from common.channel import ParentChannel
from common.progress_counter import ProgressCounter

STDERR = 2
NANOSECONDS = 1_000_000_000

# Threads that spin while they wait take the cores from the processes they wait for: where router and expert
# workers share a machine that costs a factor of two. Read once by the OpenMP runtime, so set it before.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


class ChildProcess:
    """One running child. In its parent's process group, so that killing the group leaves nobody behind."""

    def __init__(self, process: asyncio.subprocess.Process, channel: ParentChannel) -> None:
        self.channel = channel
        self._process = process
        # asyncio's own kill polls first and may reap the child before its watcher does, which then reports
        # the status 255. A descriptor of the process (Linux) cannot mean another one either.
        self._descriptor = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None

    @classmethod
    async def start(
        cls, module: str, accepted: dict[str, type], progress: ProgressCounter | None = None
    ) -> ChildProcess:
        """Run `python -m module --channel-fd N [--progress-fd M]`.

        Args:
            module: what the child runs; it calls common.lifeline.obey_parent_only first.
            accepted: the messages it may send.
            progress: what it counts in.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", module, "--channel-fd", str(theirs.fileno())]
            fds = [theirs.fileno()]
            if progress is not None:
                command += ["--progress-fd", str(progress.fd)]
                fds.append(progress.fd)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=STDERR,
                env={**ENVIRONMENT, **os.environ},
                pass_fds=fds,
            )
        return cls(process, await ParentChannel.open(ours, accepted))

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended yet."""
        return self._process.returncode is None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (Linux; elsewhere nobody can tell, and it is False)."""
        return self._stat()[:1] in (["T"], ["t"])

    @property
    def cpu_time_ns(self) -> int:
        """Processor time it has used; 0 where the system does not tell."""
        fields = self._stat()
        if len(fields) < 13:
            return 0
        ticks = int(fields[11]) + int(fields[12])
        return ticks * NANOSECONDS // os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the child at once, stopped or not."""
        if not self.is_running:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for the child's end; return its exit status, negative for the signal that ended it."""
        status = await self._process.wait()
        self.channel.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        return status

    async def stop(self, grace_s: float) -> None:
        """Wait for an end that was asked for, at most `grace_s`; then kill."""
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        await self.wait()

    def _stat(self) -> list[str]:
        """The fields of /proc/PID/stat after the name: state first (proc_pid_stat(5))."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return []
        return text.rpartition(")")[2].split()
