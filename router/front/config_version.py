"""One version of the configuration, as the history keeps it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ConfigVersion:
    """A document that was in force.

    Attributes:
        number: grows by one with every version; never used twice.
        created_s: when it came into force, in seconds since 1970.
        author: who asked for it: a peer's address, "start" or "SIGHUP".
        origin: "file", "reload" or "rollback to NUMBER".
        document: the configuration file's content, before the environment.
    """

    number: int
    created_s: float
    author: str
    origin: str
    document: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the document, whatever the order of its keys."""
        return hash_of(self.document)


def hash_of(document: dict[str, Any]) -> str:
    """SHA-256 of a document's values, in hexadecimal."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
