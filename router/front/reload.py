"""Reloading the configuration: everything that can fail is tried first, then it changes all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from common.config import Config, Effective
from common.config_changes import Change, changes_between
from common.config_file import read_document
from common.errors import ConfigError, ExpertMeshError, ReloadRefused, VersionConflict
from common.json_file import shown_path
from router.front.config_history import ConfigHistory
from router.front.config_in_force import ConfigInForce
from router.front.config_version import ConfigVersion, hash_of
from router.front.rollout import Prepared, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A document somebody wants in force.

    Attributes:
        author, origin: as in ConfigVersion.
        source: what a sentence about a bad value begins with; may be empty.
        expected_version: refuse where another version is in force; None: whatever is in force.
        is_dry_run: say what would happen, and change nothing.
    """

    document: dict[str, Any]
    author: str
    origin: str
    source: str = ""
    expected_version: int | None = None
    is_dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a proposal.

    Attributes:
        version: in force now.
        is_applied: whether that is a new one.
        refusals: why a dry run's proposal would not be applied.
    """

    version: int
    is_applied: bool
    changes: list[Change]
    warnings: list[str]
    refusals: list[str]


class Reload:
    """Applies one proposal after the other. Whatever goes wrong, the configuration in force stays whole."""

    def __init__(
        self,
        in_force: ConfigInForce,
        history: ConfigHistory,
        rollout: Rollout,
        check: Callable[[Effective], Awaitable[None]],
        on_change: Callable[[Config, Config], None],
    ) -> None:
        """Take part with what is handed over.

        Args:
            in_force: what a proposal takes the place of.
            history: where versions are kept.
            rollout: asks the engine and the workers.
            check: raises ReloadRefused where the fleet must not go on with a configuration.
            on_change: gets the configuration of before and the one that is in force now; it must not fail.
        """
        self._in_force = in_force
        self._history = history
        self._rollout = rollout
        self._check = check
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[Outcome]] = set()

    async def apply(self, proposal: Proposal) -> Outcome:
        """Put a document in force.

        Raises:
            ConfigError: a value in it is wrong.
            VersionConflict: another version is in force than was expected.
            ReloadRefused: keys differ that cannot change now, or the engine or a worker cannot go on with it.
            NotReady: the engine, a worker or the history could not take part.
        """
        task = asyncio.create_task(self._apply_in_turn(proposal))
        self._running.add(task)
        task.add_done_callback(self._forget)
        # A caller who leaves must not leave a change half made.
        return await asyncio.shield(task)

    async def roll_back(self, number: int, author: str, expected_version: int | None) -> Outcome:
        """Put the document of an earlier version in force again, as a new version.

        Raises:
            VersionUnknown: it is not kept.
            ExpertMeshError: as for `apply`.
        """
        document = self._history.find(number).document
        origin, source = f"rollback to {number}", f"version {number}"
        return await self.apply(Proposal(document, author, origin, source, expected_version))

    async def reread(self) -> None:
        """Put in force what the file given at start holds now; an error is logged and changes nothing."""
        file = self._in_force.effective.file
        try:
            if file is None:
                raise ConfigError("the router was started without --config: there is no file to read again")
            document = read_document(file)
            self._in_force.file_hash = hash_of(document)
            outcome = await self.apply(Proposal(document, "SIGHUP", "file", shown_path(file)))
        except ConfigError as error:
            for problem in error.problems:
                logger.error("the configuration was not reloaded: %s", problem)
        except ExpertMeshError as error:
            logger.error("the configuration was not reloaded: %s", error)
        else:
            if not outcome.is_applied:
                logger.info("%s holds what is in force already: version %d", file, outcome.version)

    async def finish(self) -> None:
        """Return when no proposal is under way."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _apply_in_turn(self, proposal: Proposal) -> Outcome:
        async with self._lock:
            return await self._apply(proposal)

    async def _apply(self, proposal: Proposal) -> Outcome:
        before, version = self._in_force.effective, self._in_force.version.number
        if proposal.expected_version not in (None, version):
            raise VersionConflict(
                f"version {version} is in force, but version {proposal.expected_version} was expected: look "
                "at what has changed and try again"
            )
        after = before.replaced_by(proposal.document, proposal.source)
        changes = changes_between(before.config, after.config, after.paths)
        warnings = [*after.config.warnings, *_overruled(before, after)]
        cold = {change.path: change.refusal for change in changes if change.refusal}
        if proposal.is_dry_run:
            refusals = await self._refusals(before, after, cold)
            return Outcome(version, False, changes, warnings, refusals)
        if cold:
            raise ReloadRefused(cold)
        await self._check(after)
        if hash_of(after.document) == self._in_force.version.content_hash:
            return Outcome(version, False, changes, warnings, [])
        prepared = await self._rollout.prepare(before.config, after.config)
        try:
            added = await self._write(proposal, prepared)
        except BaseException:
            self._rollout.give_up(prepared)
            raise
        # From here on nothing waits and nothing fails.
        self._in_force.take(after, added)
        self._rollout.commit(prepared)
        self._on_change(before.config, after.config)
        logger.info(
            "configuration version %d is in force, by %s (%s): %s",
            added.number,
            added.author,
            added.origin,
            ", ".join(f"{change.path} {change.old_json} -> {change.new_json}" for change in changes)
            or "no value differs",
        )
        return Outcome(added.number, True, changes, [*warnings, *self._in_force.unsaved(after)], [])

    async def _refusals(self, before: Effective, after: Effective, cold: dict[str, str]) -> list[str]:
        """Why a configuration would not come into force, as far as that can be asked."""
        try:
            if cold:
                raise ReloadRefused(cold)
            await self._check(after)
            await self._rollout.ask(before.config, after.config)
        except ReloadRefused as error:
            return list(error.refusals.values())
        return []

    async def _write(self, proposal: Proposal, prepared: Prepared | None) -> ConfigVersion:
        """Write the version, and take it back where somebody who had prepared for it is gone meanwhile."""
        added = await asyncio.to_thread(
            self._history.append, proposal.document, proposal.author, proposal.origin
        )
        try:
            await self._rollout.confirm(prepared)
        except BaseException:
            await asyncio.to_thread(self._history.withdraw, added)
            raise
        return added

    def _forget(self, task: asyncio.Task[Outcome]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever asked may have left


def _overruled(before: Effective, after: Effective) -> list[str]:
    """Name every key whose new value in the document has no effect, since the environment sets it."""
    found = []
    for field, path in after.paths.items():
        section, _, key = path.rpartition(".")
        was, is_now = (_section(effective, section).get(key) for effective in (before, after))
        origin = after.origins[field]
        if origin.kind == "environment" and was != is_now:
            found.append(f"{path} is set by {origin.detail} in the router's environment, which wins")
    return found


def _section(effective: Effective, name: str) -> dict[str, Any]:
    section = effective.document.get(name)
    return section if isinstance(section, dict) else {}
