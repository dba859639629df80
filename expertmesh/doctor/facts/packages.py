"""Which Python and which packages are installed, by their metadata: nothing is imported."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from expertmesh.doctor.requirement import Requirement, parse_requirement

PROJECT = "expertmesh"
OPTIONAL = ("torch-npu",)


@dataclass(frozen=True, slots=True)
class PackageFacts:
    """What is installed.

    Attributes:
        python: like "3.11.2".
        machine: like "Linux x86_64".
        versions: of expertmesh and all it needs, by name; a package that is missing is not there.
        requirements: who needs what, without extras: of expertmesh, and of what it needs.
    """

    python: str
    machine: str
    versions: dict[str, str]
    requirements: tuple[tuple[str, Requirement], ...]


def gather_packages() -> PackageFacts:
    """Read the metadata of expertmesh and of the packages it names."""
    own = _requirements_of(PROJECT)
    names = (*(one.name for one in own), *OPTIONAL)
    versions = {name: version for name in (PROJECT, *names) if (version := _version_of(name)) is not None}
    requirements = [(PROJECT, one) for one in own]
    for name in names:
        requirements += [(name, one) for one in _requirements_of(name) if one.name in versions]
    return PackageFacts(
        platform.python_version(),
        f"{platform.system()} {platform.machine()}",
        versions,
        tuple(requirements),
    )


def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements_of(name: str) -> tuple[Requirement, ...]:
    try:
        lines = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return ()
    return tuple(one for line in lines if (one := parse_requirement(line)) is not None)
