"""Runs a program of the system, within a deadline, and keeps what it says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

MAX_OUTPUT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ProgramAnswer:
    """What came of running a program.

    Attributes:
        path: where it was found; None: nowhere.
        status: its exit status; None where it was not found, could not be started or gave no answer in time.
        output: its stdout.
        error: what it says on stderr, or why there is no status.
    """

    path: str | None = None
    status: int | None = None
    output: str = ""
    error: str = ""

    @property
    def has_answered(self) -> bool:
        """Whether it ended well."""
        return self.status == 0


def ask_program(places: Sequence[str], arguments: Sequence[str], timeout_s: float) -> ProgramAnswer:
    """Run the first of `places` that is there: names on PATH or absolute paths."""
    path = next((found for place in places if (found := shutil.which(place)) is not None), None)
    if path is None:
        return ProgramAnswer(error=f"{places[0]} is not installed, or not on PATH")
    try:
        result = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = _text(expired.stdout or b"")
        return ProgramAnswer(path, None, output, f"{places[0]} gave no answer within {timeout_s:g} s")
    except OSError as error:
        return ProgramAnswer(path, None, "", f"{places[0]} cannot be started: {error.strerror}")
    return ProgramAnswer(path, result.returncode, _text(result.stdout), _text(result.stderr).strip())


def _text(output: bytes) -> str:
    return output[:MAX_OUTPUT_BYTES].decode(errors="replace")
