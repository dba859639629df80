"""Which versions of the configuration were in force: in memory and, with a directory, on disk."""

from __future__ import annotations

import logging
import time
from typing import Any

from common.errors import ConfigError, NotReady, VersionUnknown
from router.front.config_version import ConfigVersion
from router.front.version_files import VersionFiles

logger = logging.getLogger(__name__)

MOST_VERSIONS = 50
"""Older ones are forgotten."""


class ConfigHistory:
    """The last versions, oldest first. A version is in the history completely, or it never was."""

    def __init__(self, files: VersionFiles | None) -> None:
        """Read what is there. `files` None: versions are kept in memory and end with the process."""
        self._files = files
        self.damaged: list[str] = []
        numbers = files.numbers() if files is not None else []
        self._last_number = numbers[-1] if numbers else 0
        self._versions = tuple(version for number in numbers if (version := self._read(number)) is not None)

    @property
    def directory(self) -> str:
        """Where versions are kept; empty: in memory only."""
        return str(self._files.directory) if self._files is not None else ""

    @property
    def versions(self) -> tuple[ConfigVersion, ...]:
        """All that are kept, oldest first."""
        return self._versions

    @property
    def last_good(self) -> ConfigVersion | None:
        """The newest one that is whole."""
        return self._versions[-1] if self._versions else None

    def find(self, number: int) -> ConfigVersion:
        """One version by its number.

        Raises:
            VersionUnknown: it is not kept.
        """
        for version in self._versions:
            if version.number == number:
                return version
        kept = ", ".join(str(version.number) for version in self._versions) or "none"
        raise VersionUnknown(f"version {number} is not kept; these are: {kept}")

    def append(self, document: dict[str, Any], author: str, origin: str) -> ConfigVersion:
        """Add a version and return when it is safe. Blocks on the disk.

        Raises:
            NotReady: it could not be written; nothing was added.
        """
        # A number is not used again, even where writing it failed.
        self._last_number += 1
        version = ConfigVersion(self._last_number, time.time(), author, origin, document)
        if self._files is not None:
            try:
                self._files.write(version)
            except OSError as error:
                raise NotReady(
                    f"version {version.number} could not be written to {self.directory} "
                    f"({error.strerror or error}): nothing was changed",
                    "HISTORY_NOT_WRITTEN",
                ) from None
        self._versions = (*self._versions, version)[-MOST_VERSIONS:]
        self._forget()
        return version

    def withdraw(self, version: ConfigVersion) -> None:
        """Take back a version that did not come into force. Blocks on the disk."""
        self._versions = tuple(kept for kept in self._versions if kept is not version)
        if self._files is None:
            return
        try:
            self._files.remove(version.number)
        except OSError as error:
            logger.error(
                "version %d never came into force and could not be removed from %s: %s",
                version.number,
                self.directory,
                error,
            )

    def close(self) -> None:
        """Leave the directory to the next router."""
        if self._files is not None:
            self._files.close()

    def _read(self, number: int) -> ConfigVersion | None:
        try:
            return self._files.read(number) if self._files is not None else None
        except ConfigError as error:
            self.damaged.append(f"version {number} of the configuration is lost: {error}")
            return None

    def _forget(self) -> None:
        """Remove the files of old versions; one that stays is removed with the next version."""
        if self._files is None:
            return
        try:
            for number in self._files.numbers()[:-MOST_VERSIONS]:
                self._files.remove(number)
        except OSError as error:
            logger.warning("old versions in %s could not be removed: %s", self.directory, error)
