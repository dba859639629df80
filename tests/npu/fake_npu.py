"""A fake NPU in this process: its libraries, and every thread's operators on the CPU."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from tests.npu.fake_cann.build import MAIN


def load_cann(directory: Path) -> None:
    """Load the libraries of the fake CANN: whoever asks for one of their names afterwards gets these."""
    # What is put on a stream is then put there by the thread that asks for it.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    for library in [directory / MAIN, *sorted(directory.glob("*.so"))]:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def run_all_threads_on_cpu() -> None:
    """Enter NpuOnCpu in this thread and in every thread that is started from now on."""
    from tests.npu.cpu_mode import NpuOnCpu

    enter: Any = NpuOnCpu

    run = threading.Thread.run

    def run_on_cpu(self: threading.Thread) -> None:
        with enter():
            run(self)

    threading.Thread.run = run_on_cpu  # type: ignore[method-assign]
    enter().__enter__()
