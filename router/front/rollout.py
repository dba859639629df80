"""How a change that acts on steps comes into force: the engine and every worker agree, then all take it up.

The engine agrees to a Tune, and the workers by preparing an epoch beside the one in force. Until `commit` the
old configuration and the old epoch serve; `commit` waits for nothing and cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common.config import Config
from common.errors import ControlError, EpochRefused, NotReady, ReloadRefused
from router.front.engine_tuning import UNCHANGED, Agreed, EngineTuning
from router.front.epoch_attempt import EpochAttempt
from router.front.epochs import Epochs


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all have agreed to.

    Attributes:
        agreed: by the engine.
        attempt: the epoch that the workers have prepared; None where none is in force.
    """

    agreed: Agreed
    attempt: EpochAttempt | None


class Rollout:
    """Prepares one change after the other, and commits it or gives it up.

    Attributes:
        epochs: None where the experts are in the engine's process.
    """

    def __init__(self, tuning: EngineTuning, epochs: Epochs | None = None) -> None:
        self.epochs = epochs
        self._tuning = tuning

    async def ask(self, before: Config, after: Config) -> None:
        """Ask the engine and the workers whether they could go on with another configuration.

        Raises:
            ReloadRefused: one of them could not.
            NotReady: one of them does not answer.
        """
        if await self._tuning.propose(before, after) is not None:
            await self._ask_workers(after)

    async def prepare(self, before: Config, after: Config) -> Prepared | None:
        """Have everybody get ready; None where the change makes no difference to them.

        Raises:
            ReloadRefused: one of them cannot; the others have been let go.
            NotReady: one of them died or is late; likewise.
        """
        agreed = await self._tuning.propose(before, after)
        if agreed is None:
            return None
        attempt = None
        if self.epochs is not None:
            with _in_its_words():
                attempt = await self.epochs.prepare_beside(after)
        if attempt is None:
            await self._ask_workers(after)
        return Prepared(agreed, attempt)

    async def confirm(self, prepared: Prepared | None) -> None:
        """Make sure, last of all, that what was prepared still stands.

        Raises:
            ReloadRefused: a worker has changed its mind.
            NotReady: somebody died meanwhile.
        """
        if prepared is None or self.epochs is None:
            return
        with _in_its_words():
            await self.epochs.confirm(prepared.attempt)

    def commit(self, prepared: Prepared | None) -> None:
        """Let the next step begin the new epoch in the new way, once the configuration is in force."""
        if prepared is None:
            return
        if self.epochs is not None:
            self.epochs.commit(prepared.attempt)
        self._tuning.commit(prepared.agreed, prepared.attempt.epoch if prepared.attempt is not None else 0)

    def give_up(self, prepared: Prepared | None) -> None:
        """Let go of what was prepared."""
        if prepared is not None and self.epochs is not None:
            self.epochs.give_up(prepared.attempt)

    async def _ask_workers(self, config: Config) -> None:
        if self.epochs is None:
            return
        with _in_its_words():
            refusals = await self.epochs.ask(config)
        if refusals:
            raise _refused([EpochRefused(name, reason) for name, reason in refusals.items()])


@contextmanager
def _in_its_words() -> Iterator[None]:
    """Say what went wrong as a reload says it."""
    try:
        yield
    except EpochRefused as error:
        raise _refused([error]) from None
    except ControlError as error:
        raise NotReady(f"{error}: {UNCHANGED}", "WORKER_LOST") from None


def _refused(errors: list[EpochRefused]) -> ReloadRefused:
    return ReloadRefused({f"expert worker {error.worker}": f"{error}: {UNCHANGED}" for error in errors})
