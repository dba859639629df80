"""Versions of the configuration on disk: one file each, there completely or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path

from common.errors import ConfigError
from common.json_file import read_json, shown_path
from router.front.config_version import ConfigVersion, hash_of

FILE = re.compile(r"config-([0-9]{10})\.json$")
UNFINISHED = ".unfinished"
LOCK = "lock"
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600


class VersionFiles:
    """A directory that one router owns for as long as it runs."""

    def __init__(self, directory: Path) -> None:
        """Take the directory, and remove what an earlier router had not finished.

        Raises:
            ConfigError: it cannot be made or written, or another router has it.
        """
        self.directory = directory
        try:
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, FILE_MODE)
        except OSError as error:
            raise ConfigError(_unusable(directory, error.strerror or str(error))) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in directory.glob(f"*{UNFINISHED}"):
                path.unlink()
        except OSError as error:
            os.close(self._lock)
            why = "another router uses it" if isinstance(error, BlockingIOError) else error.strerror
            raise ConfigError(_unusable(directory, str(why))) from None

    def close(self) -> None:
        """Leave the directory to the next router."""
        os.close(self._lock)

    def numbers(self) -> list[int]:
        """The versions that have a file, damaged ones too, oldest first."""
        found = (FILE.match(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def read(self, number: int) -> ConfigVersion:
        """Read one version.

        Raises:
            ConfigError: its file is not what `write` wrote.
        """
        path = self._path(number)
        fields = read_json(path)
        try:
            if not isinstance(fields, dict):
                raise TypeError("no object")
            version = ConfigVersion(
                int(fields["number"]),
                float(fields["created_s"]),
                str(fields["author"]),
                str(fields["origin"]),
                dict(fields["document"]),
            )
            is_whole = version.number == number and version.content_hash == fields["sha256"]
        except (KeyError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ConfigError(f"{shown_path(path)} is damaged: its content does not fit its hash")
        return version

    def write(self, version: ConfigVersion) -> None:
        """Write one version and return when it will survive a power failure.

        Raises:
            OSError: it could not be written; it is not there.
        """
        path = self._path(version.number)
        unfinished = path.with_name(path.name + UNFINISHED)
        fields = {
            "number": version.number,
            "created_s": version.created_s,
            "author": version.author,
            "origin": version.origin,
            "sha256": hash_of(version.document),
            "document": version.document,
        }
        try:
            self._write_whole(unfinished, json.dumps(fields).encode())
            # Before this line the version is not there, after it all of it is.
            os.replace(unfinished, path)
            self._sync_directory()
        except OSError:
            for one in (unfinished, path):
                one.unlink(missing_ok=True)
            raise

    def remove(self, number: int) -> None:
        """Remove one version.

        Raises:
            OSError: it is still there.
        """
        self._path(number).unlink(missing_ok=True)
        self._sync_directory()

    def _path(self, number: int) -> Path:
        return self.directory / f"config-{number:010}.json"

    def _write_whole(self, path: Path, content: bytes) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        try:
            with memoryview(content) as rest:
                written = 0
                while written < len(rest):
                    written += os.write(file, rest[written:])
            os.fsync(file)
        finally:
            os.close(file)

    def _sync_directory(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _unusable(directory: Path, why: str) -> str:
    return (
        f"ExpertMesh.stateDir is {shown_path(directory)} and cannot be used: {why}; name a directory of this "
        "router's own, or leave it out"
    )
