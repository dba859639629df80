"""An executor that takes its machine for a small one: `python -m tests.distributed.poor_executor`."""

from __future__ import annotations

from common import host_memory
from expert_worker.executor import main

FREE_BYTES = 1 << 28


def free_bytes() -> int:
    return FREE_BYTES


if __name__ == "__main__":
    host_memory.free_memory = free_bytes  # type: ignore[assignment]
    main()
