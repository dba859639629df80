"""A child that is kept running: started, listened to, and started again when it dies. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common import errors
from common.channel import Fatal
from common.child_process import ChildProcess
from common.errors import ControlError, ExpertMeshError
from common.progress_counter import ProgressCounter
from common.restart_delay import RestartDelay

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a child is.

    Attributes:
        name: as sentences call it, for example "the router's engine".
        module: what `python -m` runs.
        accepted: the messages it may send.
        ready: the message that says it has started.
    """

    name: str
    module: str
    accepted: dict[str, type]
    ready: type


class KeptChild:
    """Owns one child at a time."""

    def __init__(
        self,
        kind: Kind,
        configure: Callable[[], object],
        on_message: Callable[[Any], None],
        on_ended: Callable[[str], None],
        progress: ProgressCounter | None = None,
    ) -> None:
        """Prepare to run children of one kind.

        Args:
            kind: what they are.
            configure: makes the first message to each of them.
            on_message: gets every message but Fatal.
            on_ended: gets a sentence when a child that had started is gone.
            progress: what they count in, one after the other.
        """
        self._kind = kind
        self._configure = configure
        self._on_message = on_message
        self._on_ended = on_ended
        self._progress = progress
        self._child: ChildProcess | None = None
        self._was_ready = False
        self._is_stopping = False

    @property
    def child(self) -> ChildProcess | None:
        """The child, while there is one."""
        return self._child

    def send(self, message: object) -> None:
        """Queue one message; a child that is gone does not get it."""
        if self._child is not None:
            self._child.channel.send(message)

    def kill(self) -> None:
        """End the child at once; another follows."""
        if self._child is not None:
            self._child.kill()

    async def run(self) -> None:
        """Keep a child running until `stop`.

        Raises:
            ExpertMeshError: the first child could not start; starting it again would not help.
        """
        delay = RestartDelay()
        while not self._is_stopping:
            started_s = time.monotonic()
            error = await self._run_once()
            if self._is_stopping:
                return
            if not self._was_ready:
                raise error
            self._on_ended(str(error))
            delay_s = delay.after(time.monotonic() - started_s)
            logger.warning("%s; starting it again in %.1f s", error, delay_s)
            await asyncio.sleep(delay_s)

    async def stop(self, farewell: object, grace_s: float) -> None:
        """Say the last message; the child is killed when it has not ended within `grace_s`."""
        self._is_stopping = True
        child = self._child
        if child is not None:
            child.channel.send(farewell)
            await child.stop(grace_s)

    async def _run_once(self) -> ExpertMeshError:
        """Start a child and pass its messages on; return why it ended."""
        child = await ChildProcess.start(self._kind.module, self._kind.accepted, self._progress)
        self._child = child
        fatal: Fatal | None = None
        broken = ""
        try:
            child.channel.send(self._configure())
            async for message in child.channel:
                if isinstance(message, Fatal):
                    fatal = message
                    continue
                self._was_ready = self._was_ready or isinstance(message, self._kind.ready)
                self._on_message(message)
        except (ControlError, ValueError) as error:
            broken = f" after sending what is no message ({error})"
        finally:
            self._child = None
            child.kill()
            status = await child.wait()
        if fatal is not None:
            return self._error_from(fatal)
        return ControlError(f"{self._kind.name} ended with status {status}{broken}")

    def _error_from(self, fatal: Fatal) -> ExpertMeshError:
        """The error the child died of, where it can be built from its sentence."""
        kind = getattr(errors, fatal.kind, None)
        if kind in (errors.ConfigError, errors.CheckpointError):
            error: ExpertMeshError = kind(fatal.message)
            return error
        return ControlError(f"{self._kind.name} could not go on: {fatal.message}")
