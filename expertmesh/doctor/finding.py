"""What one check found out, for a person and for a program."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a check ended. Failures alone make `doctor` exit with 1."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at, for example "ports".
        found: one sentence: what is there.
        symptom: what somebody sees who starts the services all the same.
        remedy: what to do about it.
    """

    outcome: Outcome
    subject: str
    found: str
    symptom: str = ""
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """All is well."""
    return Finding(Outcome.OK, subject, found)


def warning(subject: str, found: str, symptom: str, remedy: str) -> Finding:
    """The services start, and something will be slow, missing or surprising."""
    return Finding(Outcome.WARNING, subject, found, symptom, remedy)


def failure(subject: str, found: str, symptom: str, remedy: str) -> Finding:
    """The services do not start, or do not serve."""
    return Finding(Outcome.FAILURE, subject, found, symptom, remedy)


def not_applicable(subject: str, reason: str) -> Finding:
    """There is nothing to look at here."""
    return Finding(Outcome.NOT_APPLICABLE, subject, reason)
