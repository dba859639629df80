"""The speed of an engine that is a Python library, measured in a process and an environment of its own.

The module that drives the engine is run as `PYTHON -m MODULE MODEL_DIR WORKLOAD`, and prints its speeds as
JSON after a mark, since engines print much of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.workload import Speeds, Workload

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 1800.0
MARK = "speeds: "


def engine_speeds(python: Path, module: str, model: Path, workload: Workload) -> Speeds:
    """Run the engine that `module` drives, by the interpreter `python`."""
    command = (str(python), "-m", module, str(model.resolve()), workload.to_json())
    environment = os.environ | {
        "OMP_NUM_THREADS": str(workload.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=TIMEOUT_S
    )
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not marked:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    speeds: Speeds = json.loads(marked[-1].removeprefix(MARK))
    return speeds


def drive(measure: Callable[[Path, Workload], Speeds]) -> None:
    """What such a module does as a program: measure what the command line says, and print it."""
    speeds = measure(Path(sys.argv[1]), Workload.from_json(sys.argv[2]))
    print(MARK + json.dumps(speeds), flush=True)
