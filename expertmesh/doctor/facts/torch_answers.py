"""Asks a child process with torch (common.torch_examination): this package never imports it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.doctor.facts.program import ask_program

TIMEOUT_S = 120.0
"""Importing torch from a cold disk takes a while."""


@dataclass(frozen=True, slots=True)
class TorchAnswers:
    """What the child said.

    Attributes:
        answers: an object for each subject it came to; the key `error` says why there is no answer.
        ending: how the child ended, where it ended before its last subject; else empty.
    """

    answers: Mapping[str, Mapping[str, Any]]
    ending: str = ""

    def of(self, subject: str) -> Mapping[str, Any]:
        """The answer about a subject; an `error` where there is none."""
        missing = f"the examination ended before it ({self.ending or 'it was not asked'})"
        return self.answers.get(subject, {"error": missing})


def ask_torch(data_address: str, model: Path | None) -> TorchAnswers:
    """Start the child and wait for its answers, for at most TIMEOUT_S."""
    arguments = ["-m", "common.torch_examination", "--data-address", data_address]
    if model is not None:
        arguments += ["--model", str(model)]
    answer = ask_program([sys.executable], arguments, TIMEOUT_S)
    ending = "" if answer.has_answered else _ending(answer.status, answer.error)
    return TorchAnswers(_read(answer.output), ending)


def _read(output: str) -> dict[str, Mapping[str, Any]]:
    answers: dict[str, Mapping[str, Any]] = {}
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a vendor's library may print what it likes, and a killed child half a line
        if isinstance(found, dict):
            answers.update({key: value for key, value in found.items() if isinstance(value, dict)})
    return answers


def _ending(status: int | None, error: str) -> str:
    words = next((line for line in reversed(error.splitlines()) if line.strip()), "")
    if status is None:
        return words
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {words}" if words else how
