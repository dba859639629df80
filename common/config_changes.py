"""What differs between two configurations, key by key. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config import GIGABYTE, MARKS, Config
from common.config_problems import json_line
from common.reload_class import HOT, ReloadClass

DIGITS_OF_A_GIGABYTE = 9
"""A byte is about 1e-9 GB."""


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs.

    Attributes:
        field: its name in `Config`.
        path: the JSON path of its key.
        old_json, new_json: as in the file, absent values as what they mean.
    """

    field: str
    path: str
    old_json: str
    new_json: str
    reload: ReloadClass

    @property
    def refusal(self) -> str:
        """Why it cannot take effect now, and what would be needed; empty where it can."""
        if self.reload is HOT:
            return ""
        old, new = (json_line(json.loads(text)) for text in (self.old_json, self.new_json))
        return f"{self.path} is {old} and would become {new}, but that needs {self.reload.needs}"


def changes_between(old: Config, new: Config, paths: Mapping[str, str]) -> list[Change]:
    """List what differs, in the order of the fields.

    Args:
        old: what is in force.
        new: what is asked for.
        paths: the JSON path of each field.
    """
    before, after = _as_in_the_file(old), _as_in_the_file(new)
    return [
        Change(field, paths[field], json.dumps(before[field]), json.dumps(after[field]), mark.reload)
        for field, mark in MARKS.items()
        if getattr(old, field) != getattr(new, field)
    ]


def _as_in_the_file(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return values | {"kv_cache_bytes": round(config.kv_cache_bytes / GIGABYTE, DIGITS_OF_A_GIGABYTE)}
