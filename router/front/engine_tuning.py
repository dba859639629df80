"""How the running engine takes up another configuration: asked first, told when all is agreed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from common.config import Config
from common.errors import NotReady, ReloadRefused
from router.messages import CommitTune, Tune, Tuned, TuneRefused

TIMEOUT_S = 30.0
"""The engine answers between two steps: longer than any step."""
UNCHANGED = "the configuration in force stays as it was"


@dataclass(frozen=True, slots=True)
class Agreed:
    """What an engine has agreed to. `start` says which start of the engine it was."""

    tune_id: int
    start: int


class EngineTuning:
    """The front's end of Tune. One proposal at a time; a later one takes the place of an earlier one."""

    def __init__(
        self,
        send: Callable[[object], None],
        restart: Callable[[], None],
        is_loaded: Callable[[], bool],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`send` and `restart` reach the engine; `is_loaded` says whether it can be asked."""
        self._send = send
        self._restart = restart
        self._is_loaded = is_loaded
        self._timeout_s = timeout_s
        self._last_id = 0
        self._start = 0
        self._answer: asyncio.Future[None] | None = None

    def engine_started(self) -> None:
        """An engine is being started with the configuration in force."""
        self._start += 1

    def engine_ended(self) -> None:
        """The engine is gone, and what it had agreed to with it."""
        self._fail(NotReady(f"the router's engine ended before it had agreed: {UNCHANGED}", "ENGINE_LOST"))

    def answered(self, message: Tuned | TuneRefused) -> None:
        """The engine has answered; an answer to an earlier question is of no use any more."""
        if message.tune_id != self._last_id or self._answer is None or self._answer.done():
            return
        if isinstance(message, TuneRefused):
            self._fail(ReloadRefused({"engine": f"the engine refuses: {message.reason}"}))
        else:
            self._answer.set_result(None)

    async def propose(self, old: Config, new: Config) -> Agreed | None:
        """Ask the engine whether it can go on with `new`; None where that makes no difference to it.

        Raises:
            ReloadRefused: it cannot.
            NotReady: it did not answer, or there is none to ask.
        """
        if tune_of(new, 0) == tune_of(old, 0):
            return None
        if not self._is_loaded():
            raise NotReady(f"the router's engine has not loaded yet: {UNCHANGED}; try again when it is ready")
        self._last_id += 1
        self._answer = asyncio.get_running_loop().create_future()
        agreed = Agreed(self._last_id, self._start)
        self._send(tune_of(new, self._last_id))
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._answer
        except TimeoutError:
            raise NotReady(
                f"the router's engine did not answer within {self._timeout_s:g} s: {UNCHANGED}",
                "ENGINE_SILENT",
            ) from None
        finally:
            self._answer = None
        return agreed

    def commit(self, agreed: Agreed, epoch: int) -> None:
        """Let the next step take up what was agreed to. Call it when the new configuration is in force.

        Args:
            agreed: what `propose` returned.
            epoch: the one that the engine holds for this; 0: the epoch in force goes on.
        """
        if agreed.start == self._start:
            # An engine that died meanwhile does not get this; the next one starts with what is in force now.
            self._send(CommitTune(agreed.tune_id, epoch))
        else:
            # Another engine was started meanwhile, with the configuration of before.
            self._restart()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def tune_of(config: Config, tune_id: int) -> Tune:
    """What of a configuration the running engine can take up."""
    return Tune(
        tune_id=tune_id,
        ep_level=config.ep_level,
        micro_batches=config.micro_batches,
        chunk_rows=config.chunk_rows,
        buffer_factors=[[tokens, factor] for tokens, factor in config.alltoall_ep_buffer_scale_factors],
        cutoff_factor=config.cutoff_factor,
        cutoff_min_rows=config.cutoff_min_rows,
        is_grouped=config.grouped_matmul != "off",
        max_batch_size=config.max_batch_size,
        max_prefill_tokens=config.max_prefill_tokens,
        deadline_floor_s=config.deadline_floor_s,
    )
