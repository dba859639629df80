"""How much memory, shared memory and how many open files a service of this user may have."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Resources:
    """What is there; None where it cannot be known or there is no bound.

    Attributes:
        memory_bytes: that a new process can have.
        bound_bytes: what is left of the container's own bound.
        shared_memory_bytes: free in /dev/shm.
        open_files: the soft limit.
        locked_bytes: the soft limit of locked memory.
    """

    memory_bytes: int | None
    bound_bytes: int | None
    shared_memory_bytes: int | None
    open_files: int | None
    locked_bytes: int | None

    @property
    def usable_bytes(self) -> int | None:
        """The smaller one of the machine's memory and the container's."""
        known = [one for one in (self.memory_bytes, self.bound_bytes) if one is not None]
        return min(known, default=None)


def gather_resources() -> Resources:
    """Ask the kernel."""
    return Resources(
        memory_bytes=_available_memory(),
        bound_bytes=_left_in_container(),
        shared_memory_bytes=_free_shared_memory(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
    )


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(kilobytes) * 1024 if kilobytes is not None else None


def _left_in_container() -> int | None:
    """Version 2 of cgroups, then version 1."""
    for bound, used in (
        (CGROUP / "memory.max", CGROUP / "memory.current"),
        (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(int(bound.read_text()) - int(used.read_text()), 0)
        except (OSError, ValueError):
            continue  # "max" is no number: there is no bound
    return None


def _free_shared_memory() -> int | None:
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def _limit(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft
