"""What a package says it needs of another one, and whether a version is that. Pure.

A small part of PEP 508 and PEP 440: names, comparisons of releases. What is only for an extra, a platform or
another Python is left out, since no decision here depends on it.
"""

from __future__ import annotations

import operator as compare
import re
from collections.abc import Callable
from dataclasses import dataclass

REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(;.*)?")
COMPARISON = re.compile(r"(===|==|~=|!=|>=|<=|>|<)\s*([^\s,]+)")
COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": compare.eq,
    "!=": compare.ne,
    ">=": compare.ge,
    "<=": compare.le,
    ">": compare.gt,
    "<": compare.lt,
}
RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package by its normalised name, and the comparisons that its version must pass."""

    name: str
    comparisons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.name + ",".join(f"{operator}{version}" for operator, version in self.comparisons)

    def is_met_by(self, version: str) -> bool:
        """Whether a version passes all comparisons; one that is no version passes."""
        return all(_passes(version, operator, bound) for operator, bound in self.comparisons)


def parse_requirement(line: str) -> Requirement | None:
    """Read a line of Requires-Dist; None where it has a condition or is none."""
    match = REQUIREMENT.fullmatch(line)
    if match is None or match[3]:
        return None
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    return Requirement(name, tuple(COMPARISON.findall(match[2])))


def release_of(version: str) -> tuple[int, ...] | None:
    """The numbers that a version begins with, trailing zeros left out: "2.13.0+cpu" is (2, 13)."""
    match = RELEASE.match(version)
    if match is None:
        return None
    numbers = [int(number) for number in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _passes(version: str, operator: str, bound: str) -> bool:
    if operator in ("==", "!=") and bound.endswith(".*"):
        wanted = tuple(int(number) for number in bound[:-2].split(".") if number.isdigit())
        found = release_of(version)
        is_in = found is not None and (*found, *(0,) * len(wanted))[: len(wanted)] == wanted
        return is_in == (operator == "==")
    found, limit = release_of(version), release_of(bound)
    if found is None or limit is None or operator == "===":
        return True
    if operator == "~=":
        series = tuple(int(number) for number in bound.split(".")[:-1] if number.isdigit())
        return found >= limit and (*found, *(0,) * len(series))[: len(series)] == series
    return COMPARE[operator](found, limit)
