"""Reads a JSON file that somebody else wrote, and names the file in every complaint."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from common.errors import ConfigError

MAX_FILE_BYTES = 10 << 20
MAX_SHOWN = 60
PRIVATE_MODE = 0o640


def read_json(path: Path, *, is_private: bool = False) -> object:
    """Read a whole file as JSON.

    Args:
        path: an ordinary file of at most MAX_FILE_BYTES.
        is_private: whether to refuse a file that others may read, or anybody but its owner write.

    Raises:
        ConfigError: the file is missing, not allowed, too large, or no JSON; an object has a key twice.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"{shown_path(path)} is not an ordinary file: name a file that holds JSON")
        if facts.st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{shown_path(path)} has {facts.st_size} bytes, but at most {MAX_FILE_BYTES} are read: "
                "name another file"
            )
        mode = stat.S_IMODE(facts.st_mode)
        if is_private and mode & ~PRIVATE_MODE:
            raise ConfigError(
                f"{shown_path(path)} has mode {mode:o}, but others must not be able to read or change it: "
                f"chmod {PRIVATE_MODE:o} it"
            )
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        # ValueError: a path that no file can have.
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{shown_path(path)} cannot be read: {why}") from None
    return parse_json(text, shown_path(path))


def parse_json(text: str | bytes, source: str) -> object:
    """Take text as JSON; `source` says in a complaint where it is from.

    Raises:
        ConfigError: no JSON, or an object has a key twice.
    """
    try:
        document: object = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is no JSON: {error}") from None
    return document


def shown(value: object) -> str:
    """A value as it stands in an error: on one line, and not endless."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list):
        return f"a list with {len(value)} entries"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def shown_path(path: Path) -> str:
    """A path as it stands in an error."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        found[key] = value
    return found
