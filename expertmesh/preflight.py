"""What can be known of a fleet before it starts: for `config check`, and for fleets on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.config import Config
from common.environment import hccl_buffer_mb, rank_table
from common.host_memory import free_memory
from common.model_config import ModelConfig
from common.preflight import Finding
from common.preflight_fleet import fixed_findings
from common.preflight_memory import MemoryNeed, memory_finding, router_need, worker_need
from common.weight_sizes import WeightSizes, computed_dtype

FEWER = "use more expert workers, or a machine with more memory"
LOWER = "lower ModelConfig[0].cpuMemSize, free memory, or use a machine with more of it"


def everywhere(config: Config, directory: Path) -> Iterator[Finding]:
    """Check what holds on every machine.

    Raises:
        CheckpointError: there is no model in `directory` that can be served.
        ConfigError: the rank table, or a variable of the environment, is wrong.
    """
    model = ModelConfig.from_directory(directory)
    table = None if config.experts_in_process else rank_table()
    yield from fixed_findings(config, model, table, hccl_buffer_mb(config.device))


def alone_here(config: Config, directory: Path) -> Iterator[Finding]:
    """Check whether this machine could be the router's, or one worker's, as far as memory goes.

    Of an accelerator only the process that uses it knows how much there is.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        ConfigError: its dtype is none to compute with.
    """
    if config.device != "cpu":
        return
    router, worker = _needs(config, directory)
    yield memory_finding("the router", config.device, router, free_memory(), LOWER)
    if worker is not None:
        yield memory_finding("one expert worker", config.device, worker, free_memory(), FEWER)


def together_here(config: Config, directory: Path) -> Finding:
    """Check whether this machine has the memory for the router and all of its workers.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        ConfigError: its dtype is none to compute with.
    """
    router, worker = _needs(config, directory)
    count = config.world_size
    need = router
    if worker is not None:
        need = MemoryNeed(router.weights + count * worker.weights, count * worker.buffers, router.kv_cache)
    who = f"the router and {count} expert workers" if count else "the router"
    return memory_finding(who, config.device, need, free_memory(), LOWER)


def _needs(config: Config, directory: Path) -> tuple[MemoryNeed, MemoryNeed | None]:
    """Of the router, and of the worker with the largest share; None where there are no workers."""
    model = ModelConfig.from_directory(directory)
    sizes = WeightSizes(directory, model, computed_dtype(config, model))
    worker = (
        None
        if config.experts_in_process
        else worker_need(config, model, sizes, hccl_buffer_mb(config.device))
    )
    return router_need(config, model, sizes), worker
