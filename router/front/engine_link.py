"""The front's link to its engine: starts the process, passes messages on, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from common import errors
from common.child_process import ChildProcess
from common.errors import ControlError, ExpertMeshError
from router.messages import TO_FRONT, Configure, Fatal, Loaded, Shutdown

logger = logging.getLogger(__name__)

ENGINE_MODULE = "router.engine_process"
FIRST_RESTART_DELAY_S = 0.5
LONGEST_RESTART_DELAY_S = 30.0
# An engine that lived this long and then died is started again without growing delay.
STEADY_S = 60.0


class EngineLink:
    """Owns the engine's process."""

    def __init__(
        self,
        configure: Configure,
        on_message: Callable[[Any], None],
        on_ended: Callable[[str], None],
        module: str = ENGINE_MODULE,
    ) -> None:
        """`on_message` gets every message but Fatal; `on_ended` gets a sentence when the engine is gone."""
        self._configure = configure
        self._on_message = on_message
        self._on_ended = on_ended
        self._module = module
        self._child: ChildProcess | None = None
        self._has_loaded = False
        self._is_stopping = False

    @property
    def pid(self) -> int | None:
        """The engine's process id, while there is one."""
        return None if self._child is None else self._child.pid

    def send(self, message: object) -> None:
        """Queue one message; an engine that is gone does not get it, and its requests have ended already."""
        if self._child is not None:
            self._child.channel.send(message)

    async def run(self) -> None:
        """Keep an engine running until `stop`.

        Raises:
            ExpertMeshError: the engine could not load for the first time; starting it again would not help.
        """
        delay_s = FIRST_RESTART_DELAY_S
        while not self._is_stopping:
            started_s = time.monotonic()
            error = await self._run_once()
            if self._is_stopping:
                return
            if not self._has_loaded:
                raise error
            self._on_ended(str(error))
            if time.monotonic() - started_s > STEADY_S:
                delay_s = FIRST_RESTART_DELAY_S
            logger.warning("%s; starting it again in %.1f s", error, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RESTART_DELAY_S)

    async def stop(self, grace_s: float) -> None:
        """End the engine; it is killed when it has not ended within `grace_s`."""
        self._is_stopping = True
        child = self._child
        if child is not None:
            child.channel.send(Shutdown())
            await child.stop(grace_s)

    async def _run_once(self) -> ExpertMeshError:
        """Start an engine and pass its messages on; return why it ended."""
        child = await ChildProcess.start(self._module, TO_FRONT, None)
        self._child = child
        fatal: Fatal | None = None
        broken = ""
        try:
            child.channel.send(self._configure)
            async for message in child.channel:
                if isinstance(message, Fatal):
                    fatal = message
                    continue
                self._has_loaded = self._has_loaded or isinstance(message, Loaded)
                self._on_message(message)
        except (ControlError, ValueError) as error:
            broken = f" after sending what is no message ({error})"
        finally:
            self._child = None
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            status = await child.wait()
        if fatal is not None:
            return _as_error(fatal)
        return ControlError(f"the router's engine ended with status {status}{broken}")


def _as_error(fatal: Fatal) -> ExpertMeshError:
    """The error the engine died of, where it can be built from its sentence."""
    kind = getattr(errors, fatal.kind, None)
    if kind in (errors.ConfigError, errors.CheckpointError):
        error: ExpertMeshError = kind(fatal.message)
        return error
    return ControlError(f"the router's engine could not go on: {fatal.message}")
