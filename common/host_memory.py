"""How much memory this machine, or the container this process is in, has free; all of it but on Linux."""

from __future__ import annotations

import os
from pathlib import Path

KIBIBYTE = 1024
UNIFIED = ("memory.max", "memory.current", "inactive_file")
DIVIDED = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Limit, usage, and what of it can be given up at once: version 2 of control groups, and version 1."""


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process can still take: of the machine, or of its container where that has fewer."""
    free = [_of_machine(proc)]
    for folder, files in ((groups, UNIFIED), (groups / "memory", DIVIDED)):
        of_container = _of_container(folder, files)
        if of_container is not None:
            free.append(of_container)
    return min(free)


def _of_machine(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    # Older kernels do not say what is available; what is free is less.
    amount = facts.get("MemAvailable", facts.get("MemFree", "0 kB"))
    return int(amount.split()[0]) * KIBIBYTE


def _of_container(folder: Path, files: tuple[str, str, str]) -> int | None:
    """What is left of a container's limit; None where there is none. A container sees itself as the root."""
    limit_file, usage_file, reclaimable = files
    try:
        limit, usage = (folder / limit_file).read_text().strip(), int((folder / usage_file).read_text())
        statistics = (folder / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(reclaimable, "0")
    return max(int(limit) - usage + int(cached), 0)
