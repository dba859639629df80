"""The configuration in force, and how it came to be. Owned by the event loop, replaced as a whole."""

from __future__ import annotations

import logging

from common.config import Config, Effective
from common.json_file import shown_path
from router.front.config_history import ConfigHistory
from router.front.config_version import ConfigVersion, hash_of

logger = logging.getLogger(__name__)


class ConfigInForce:
    """What everybody reads. `take` replaces values and version together."""

    def __init__(self, at_start: Effective, history: ConfigHistory) -> None:
        """Begin with what was given at start: it wins over the last version of the history.

        A document like the last good version continues it; any other is a new version.

        Raises:
            NotReady: the version could not be written.
        """
        self.effective = at_start
        """The document, the values, and where they came from."""
        self.file_hash = hash_of(at_start.document)
        """Of the file as it was read last."""
        self._lasting = list(history.damaged)
        last = history.last_good
        if last is not None and last.content_hash == self.file_hash:
            self.version = last
        else:
            self.version = history.append(at_start.document, "start", "file")
            if last is not None:
                self._lasting.append(self._won_over(last))
        for sentence in self._lasting:
            logger.warning("%s", sentence)

    @property
    def config(self) -> Config:
        """The values."""
        return self.effective.config

    @property
    def warnings(self) -> list[str]:
        """What an operator should know about the configuration."""
        return [*self.config.warnings, *self._lasting, *self.unsaved(self.effective)]

    def take(self, effective: Effective, version: ConfigVersion) -> None:
        """Put another version in force."""
        self.effective, self.version = effective, version
        self._lasting.clear()

    def unsaved(self, effective: Effective) -> list[str]:
        """Say so where the next start would not bring a configuration back."""
        if hash_of(effective.document) == self.file_hash:
            return []
        return [
            f"{self._file} holds another configuration, which wins at the next start: to keep this one, "
            "write there what `expertmesh config show` prints, and send the router SIGHUP"
            if effective.file is not None
            else "the router was started without a file: this configuration ends with it"
        ]

    def _won_over(self, last: ConfigVersion) -> str:
        return (
            f"{self._file} differs from version {last.number}, the last that was in force, and won: it is "
            f"version {self.version.number}; `expertmesh config rollback {last.number}` returns to the other"
        )

    @property
    def _file(self) -> str:
        return shown_path(self.effective.file) if self.effective.file else "what the router was started with"
