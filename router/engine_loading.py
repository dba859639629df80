"""From a Configure to an engine that can step: sizes the cache, loads weights, opens the links' address."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from common import compute_threads, process_group
from common.device import find_device, free_memory, open_device
from common.errors import ConfigError
from common.exchange.loopback import LoopbackExchange
from common.exchange.routing import RowShape
from common.kv_cache_size import KvCacheSize, fit_kv_cache
from common.model_config import ModelConfig
from common.preflight import require
from common.preflight_memory import MemoryNeed, memory_finding
from common.quantization.row_format import int8_layers
from common.timeline import Timeline
from common.weight_sizes import WeightSizes
from router.connector import Connector
from router.engine import Engine, Membership
from router.expert_load import ExpertLoads
from router.joining import LinkAddress, RouterEnd
from router.messages import Configure, LinkFailed, Loaded, Loading, Tune
from router.model.latent_cache import LatentCache
from router.model.loading import load_model, resolve_dtype
from router.model.recording import record_modules
from router.scheduler import Limits, Scheduler

logger = logging.getLogger(__name__)

MOST_SPANS = 100_000
"""Spans a trace holds: what comes later is not recorded."""
LOADING_INTERVAL_S = 0.2
"""Shortest time between two Loading messages."""


class LoadingProgress:
    """Reports bytes as they are read, over several parts, at most every LOADING_INTERVAL_S."""

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send
        self._sent_at = 0.0
        self._earlier_bytes = 0
        self.loaded_bytes = 0

    def __call__(self, loaded_bytes: int, total_bytes: int) -> None:
        """Take the state of the part that is being read."""
        self.loaded_bytes = self._earlier_bytes + loaded_bytes
        now = time.monotonic()
        if now - self._sent_at >= LOADING_INTERVAL_S or loaded_bytes >= total_bytes:
            self._sent_at = now
            self._send(Loading(self.loaded_bytes, self._earlier_bytes + total_bytes))

    def begin_part(self) -> None:
        """Count what comes on top of what was read so far."""
        self._earlier_bytes = self.loaded_bytes


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine, the way its links are made, and what it records.

    Attributes:
        connector: None where the experts are in this process.
        timeline: None where nothing is recorded.
    """

    engine: Engine
    connector: Connector | None
    timeline: Timeline | None


def load(
    configure: Configure,
    send: Callable[[object], None],
    ask_progress: Callable[[int], int | None],
    deliver: Callable[[Membership | LinkFailed], None],
) -> LoadedEngine:
    """Load everything and say so.

    Raises:
        ConfigError: the configuration cannot work on this machine or with this checkpoint.
        CheckpointError: the checkpoint is incomplete, damaged or not of this model.
    """
    compute_threads.settle(configure.threads, configure.device)
    torch.set_float32_matmul_precision("highest")
    config = ModelConfig.from_directory(Path(configure.model_path))
    dtype = resolve_dtype(config, configure.dtype)
    device = open_device(configure.device)
    tune = Tune(**configure.tune)
    cache_size = size_cache(configure, tune, config, dtype.itemsize)
    limits = _limits(configure, tune, cache_size)
    _check_memory(configure, config, dtype, cache_size)
    scheduler = Scheduler(limits)
    address = _open_address(configure)
    progress = LoadingProgress(send)
    model = load_model(Path(configure.model_path), configure.dtype, configure.device, progress)
    timeline = Timeline(MOST_SPANS) if configure.trace_file is not None else None
    if timeline is not None:
        record_modules(model, timeline)
    engine = Engine(
        model,
        LatentCache(config, limits.num_blocks, limits.block_size, dtype, device),
        scheduler,
        vocab_size=config.vocab_size,
        device=device,
        term=configure.term,
        num_experts_per_tok=config.num_experts_per_tok,
        tune=tune,
        loads=ExpertLoads(config.n_routed_experts, config.moe_layer_ids),
        send=send,
    )
    in_int8 = int8_layers(Path(configure.model_path), config), model.kernels.quantize_rows
    shape = RowShape(config.hidden_size, config.num_experts_per_tok, dtype, *in_int8)
    connector = None
    if address is None:
        progress.begin_part()
        engine.adopt(_experts_in_process(configure, config, shape, progress))
    else:
        end = RouterEnd(
            shape,
            *(configure.term, tune.deadline_floor_s, ask_progress, timeline),
            *(config.n_routed_experts, tune.max_prefill_tokens),
        )
        connector = Connector(configure.exchange, address, end, deliver)
    send(_loaded(progress.loaded_bytes, limits, address, shape))
    return LoadedEngine(engine, connector, timeline)


def _loaded(loaded_bytes: int, limits: Limits, address: LinkAddress | None, shape: RowShape) -> Loaded:
    return Loaded(
        loaded_bytes=loaded_bytes,
        kv_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_seq_len=limits.max_seq_len,
        store_host=address.store.host if address else "",
        store_port=address.store.port if address else 0,
        int8_layers=sorted(shape.int8_layers),
    )


def size_cache(configure: Configure, tune: Tune, config: ModelConfig, item_bytes: int) -> KvCacheSize:
    """Fit cache and sequences into the budget.

    Raises:
        ConfigError: the budget holds no block.
    """
    block_size = configure.block_size
    found = fit_kv_cache(
        config,
        configure.kv_cache_bytes,
        block_size,
        item_bytes,
        configure.max_seq_len,
        tune.max_batch_size,
    )
    if found.num_blocks < 1:
        raise ConfigError(
            f"{configure.kv_cache_bytes} bytes for the KV cache hold no block of {block_size} tokens, which "
            f"takes {found.bytes_per_block}: raise cpuMemSize, on an NPU npuMemSize, or lower the block size"
        )
    if configure.max_seq_len is not None and configure.max_seq_len > found.max_seq_len:
        logger.warning(
            "maxSeqLen %d is more than the checkpoint (%d positions) and the KV cache (%d bytes) allow: "
            "%d is used",
            configure.max_seq_len,
            config.max_position_embeddings,
            configure.kv_cache_bytes,
            found.max_seq_len,
        )
    return found


def _limits(configure: Configure, tune: Tune, cache_size: KvCacheSize) -> Limits:
    return Limits(
        num_blocks=cache_size.num_blocks,
        block_size=configure.block_size,
        max_batch_size=tune.max_batch_size,
        max_prefill_tokens=tune.max_prefill_tokens,
        max_seq_len=cache_size.max_seq_len,
    )


def _check_memory(
    configure: Configure, config: ModelConfig, dtype: torch.dtype, cache_size: KvCacheSize
) -> None:
    """Compare what will be held with what is free, before anything is.

    Raises:
        ConfigError: there is less than that.
    """
    sizes = WeightSizes(Path(configure.model_path), config, str(dtype).removeprefix("torch."))
    weights = sizes.router_bytes()
    if configure.experts_in_process:
        weights += sizes.shard_bytes(_all_experts(config))
    need = MemoryNeed(weights, kv_cache=cache_size.num_bytes)
    remedy = "lower ModelConfig[0].cpuMemSize, free memory, or use a machine with more of it"
    finding = memory_finding("the router", configure.device, need, free_memory(configure.device), remedy)
    logger.info("memory: %s", finding.sentence)
    require([finding])


def _open_address(configure: Configure) -> LinkAddress | None:
    if configure.experts_in_process:
        return None
    store = process_group.open_store(configure.data_address)
    backend = find_device(configure.device).collective
    return LinkAddress(store, configure.data_address, backend, configure.same_host_transport)


def _experts_in_process(
    configure: Configure, config: ModelConfig, shape: RowShape, progress: LoadingProgress
) -> Membership:
    """Epoch 1 of a fleet that is this process: the one place where the two roles meet."""
    experts = _all_experts(config)
    open_experts = import_module("expert_worker.in_process").open_experts
    compute = open_experts(Path(configure.model_path), configure.dtype, configure.device, experts, progress)
    exchange = LoopbackExchange(compute, experts, shape.int8_layers, shape.quantize_rows)
    # Nobody is waited for here: there is no deadline to set.
    return Membership(1, exchange, 1, list, lambda _: None)


def _all_experts(config: ModelConfig) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(config.moe_layer_ids, tuple(range(config.n_routed_experts)))
