"""Where each value of the effective configuration came from. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

from common.config_file import Sections

Kind = Literal["default", "file", "environment", "override", "inferred"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value came from.

    Attributes:
        kind: what decided it.
        detail: the JSON path, the environment variable, or what the value follows from.
    """

    kind: Kind
    detail: str


def origins_of(
    keys: Mapping[str, str],
    sections: Sections,
    variables: Mapping[str, str],
    overrides: Container[str],
    inferred: Mapping[str, str],
) -> dict[str, Origin]:
    """Say for every field where it came from.

    Args:
        keys: the key of each field, like "ExpertMesh.fleetPort".
        variables: the environment variable of each key that has one set.
        overrides: the keys that were set from outside.
        inferred: what each field follows from that was not taken as it stands.
    """

    def origin_of(field: str, key: str) -> Origin:
        if field in inferred:
            return Origin("inferred", inferred[field])
        if key in overrides:
            return Origin("override", sections.path(key))
        if key in variables:
            return Origin("environment", variables[key])
        return Origin("file" if sections.is_given(key) else "default", sections.path(key))

    return {field: origin_of(field, key) for field, key in keys.items()}
