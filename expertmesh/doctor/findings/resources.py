"""Are memory, shared memory, open files and locked memory enough?"""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config
from expertmesh.doctor.facts.resources import Resources
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

GIGABYTE = 1 << 30
LEAST_SHARED_BYTES = GIGABYTE
"""NCCL and HCCL put the buffers of neighbouring processes there; a container has 64 MB by default."""
FILES_PER_SERVICE = 32
FILES_PER_WORKER = 8
"""The engine has 4 per link, and twice as many while one epoch replaces another."""
USUAL_OPEN_FILES = 1024


def judge_memory(
    resources: Resources, kv_cache_bytes: int, model_bytes: int, *, is_worker: bool
) -> Iterator[Finding]:
    """Judge whether weights and KV cache fit, if all services run on this machine.

    Args:
        kv_cache_bytes: what it may grow to; 0: unknown.
        model_bytes: of the checkpoint's tensors; 0: unknown.
        is_worker: whether only workers run here, which hold their share of the experts and no cache.
    """
    there = resources.usable_bytes
    if there is None:
        yield not_applicable("memory", "this system does not say how much is available")
        return
    if is_worker:
        yield not_applicable("memory", f"{_gb(there)} available; a worker holds its share of the experts")
        return
    bound = " within this container's bound" if resources.bound_bytes == there else ""
    if model_bytes + kv_cache_bytes > there:
        yield warning(
            "memory",
            f"{_gb(there)} are available{bound}; weights of {_gb(model_bytes)} and a KV cache of up to "
            f"{_gb(kv_cache_bytes)} do not fit, if all services run on this machine",
            "the kernel ends a service: ended with status -9, or: was ended by SIGKILL; a container: 137",
            "spread the workers over machines, lower cpuMemSize, or give the container more memory",
        )
    else:
        yield ok(
            "memory",
            f"{_gb(there)} available{bound}; weights: {_known(model_bytes)}, cache: {_known(kv_cache_bytes)}",
        )


def judge_shared_memory(resources: Resources, device: str) -> Finding:
    """Judge /dev/shm, which the collectives of accelerators use."""
    there = resources.shared_memory_bytes
    if device == "cpu" or there is None:
        return not_applicable("shared memory", "Gloo on CPUs does not use it")
    if there < LEAST_SHARED_BYTES:
        return warning(
            "shared memory",
            f"/dev/shm has {there >> 20} MiB free",
            "No space left on device, or Bus error, when the first group is made",
            "shm_size: 16g or ipc: host in the compose file, --shm-size=16g with docker run",
        )
    return ok("shared memory", f"/dev/shm has {_gb(there)} free")


def judge_open_files(resources: Resources, config: Config | None) -> Finding:
    """Judge the limit of open files against the number of workers."""
    limit = resources.open_files
    if limit is None:
        return ok("open files", "no limit")
    workers = config.world_size if config is not None else 0
    needed = FILES_PER_SERVICE + FILES_PER_WORKER * workers
    way_out = "ulimit -n 65536 before the start, LimitNOFILE= of systemd, ulimits: in the compose file"
    if limit < needed:
        return failure(
            "open files",
            f"a process may open {limit} files, and a router with {workers} workers needs about {needed}",
            "Too many open files",
            way_out,
        )
    if limit < USUAL_OPEN_FILES:
        return warning(
            "open files",
            f"a process may open {limit} files",
            "Too many open files, when many clients are connected: each is one file",
            way_out,
        )
    return ok("open files", f"a process may open {limit}")


def judge_locked_memory(resources: Resources, device: str) -> Finding:
    """Judge the limit of locked memory, which RDMA needs."""
    if device == "cpu":
        return not_applicable("locked memory", "Gloo on CPUs locks none")
    if resources.locked_bytes is not None:
        return warning(
            "locked memory",
            f"a process may lock {resources.locked_bytes >> 10} KiB",
            "RDMA cannot register its buffers: ibv_reg_mr fails with Cannot allocate memory",
            "ulimit -l unlimited, ulimits: {memlock: -1} in the compose file, LimitMEMLOCK=infinity",
        )
    return ok("locked memory", "no limit")


def _known(num_bytes: int) -> str:
    return _gb(num_bytes) if num_bytes else "unknown"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GIGABYTE:.3g} GiB"
