"""Turns the C++ of this folder into a library. Needs Python alone: the build hook loads it by its path."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("argmax", "bf16", "decode_layer", "floats", "gate", "int8", "routing", "row_messages")
)
LIBRARY = Path(__file__).with_name("kernels.so")
COMPILERS = ("g++", "clang++")
# No multiply-add that the source does not ask for, and no other freedom with floats: every path must give the
# same bits. The paths name the processor they need themselves, so one object runs on all of them.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-pthread", "-fPIC", "-shared"),
    "-Wno-psabi",  # functions take wide vectors only where they are inlined
)
TIMEOUT_S = 300


def compile_library(compilers: Sequence[str] = COMPILERS, target: Path = LIBRARY) -> str | None:
    """Compile with the first of `compilers` that can, and return why there is no library, if there is none.

    Args:
        compilers: commands, which may hold arguments; those not on PATH are passed over.
        target: the file to make. An older one is replaced when the new one is whole, since others may use it,
            or, without success, removed: it is of other code.
    """
    reason = f"no C++ compiler was found on PATH ({', '.join(compilers)})"
    try:
        for compiler in compilers:
            command = shlex.split(compiler)
            if not command or shutil.which(command[0]) is None:
                continue
            failure = _compile(command, target)
            if failure is None:
                return None
            reason = f"{compiler} failed: {failure}"
        target.unlink(missing_ok=True)
    except OSError as error:  # the folder may be read-only
        reason = str(error)
    return reason


def _compile(command: list[str], target: Path) -> str | None:
    """Return what a compiler that fails complains of first."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Moved into place when whole: another process may be loading it.
        made = Path(folder) / target.name
        try:
            result = subprocess.run(
                [*command, *FLAGS, "-o", str(made), *map(str, SOURCES)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return str(error)
        if result.returncode == 0:
            made.replace(target)
            return None
    complaints = [line.strip() for line in result.stderr.splitlines() if "error" in line]
    return f"exit status {result.returncode}, {complaints[0] if complaints else 'it did not say why'}"
