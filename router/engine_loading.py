"""From a Configure to an engine that can step: sizes the cache, loads weights, opens the links' address."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from common import process_group
from common.device import find_device, open_device
from common.errors import ConfigError
from common.exchange.loopback import LoopbackExchange
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.timeline import Timeline
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
    if configure.threads is not None:
        torch.set_num_threads(configure.threads)
    torch.set_float32_matmul_precision("highest")
    config = ModelConfig.from_directory(Path(configure.model_path))
    dtype = resolve_dtype(config, configure.dtype)
    device = open_device(configure.device)
    bytes_per_block = LatentCache.bytes_per_block(config, configure.block_size, dtype)
    tune = Tune(**configure.tune)
    limits = size_cache(configure, tune, config.max_position_embeddings, bytes_per_block)
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
    connector = None
    if address is None:
        progress.begin_part()
        engine.adopt(_experts_in_process(configure, config, progress))
    else:
        end = RouterEnd(
            RowShape(config.hidden_size, config.num_experts_per_tok, dtype),
            *(configure.term, tune.deadline_floor_s, ask_progress, timeline),
            *(config.n_routed_experts, tune.max_prefill_tokens),
        )
        connector = Connector(configure.exchange, address, end, deliver)
    send(
        Loaded(
            loaded_bytes=progress.loaded_bytes,
            kv_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_seq_len=limits.max_seq_len,
            store_host=address.store.host if address else "",
            store_port=address.store.port if address else 0,
        )
    )
    return LoadedEngine(engine, connector, timeline)


def size_cache(
    configure: Configure, tune: Tune, max_position_embeddings: int, bytes_per_block: int
) -> Limits:
    """Fit cache and sequences into the budget, and take no more blocks than full batches can use.

    Raises:
        ConfigError: the budget holds no block.
    """
    num_blocks = configure.kv_cache_bytes // bytes_per_block
    if num_blocks < 1:
        raise ConfigError(
            f"{configure.kv_cache_bytes} bytes for the KV cache hold no block of {configure.block_size} "
            f"tokens, which takes {bytes_per_block}: raise cpuMemSize, on an NPU npuMemSize, or lower the "
            "block size"
        )
    most = min(max_position_embeddings, num_blocks * configure.block_size)
    max_seq_len = most if configure.max_seq_len is None else min(configure.max_seq_len, most)
    if configure.max_seq_len is not None and configure.max_seq_len > most:
        logger.warning(
            "maxSeqLen %d is more than the checkpoint (%d positions) and the KV cache (%d tokens) allow: "
            "%d is used",
            configure.max_seq_len,
            max_position_embeddings,
            num_blocks * configure.block_size,
            max_seq_len,
        )
    useful = tune.max_batch_size * -(-max_seq_len // configure.block_size)
    return Limits(
        num_blocks=min(num_blocks, useful),
        block_size=configure.block_size,
        max_batch_size=tune.max_batch_size,
        max_prefill_tokens=tune.max_prefill_tokens,
        max_seq_len=max_seq_len,
    )


def _open_address(configure: Configure) -> LinkAddress | None:
    if configure.experts_in_process:
        return None
    store = process_group.open_store(configure.data_address)
    return LinkAddress(store, configure.data_address, find_device(configure.device).collective)


def _experts_in_process(configure: Configure, config: ModelConfig, progress: LoadingProgress) -> Membership:
    """Epoch 1 of a fleet that is this process: the one place where the two roles meet."""
    experts = {layer_id: tuple(range(config.n_routed_experts)) for layer_id in config.moe_layer_ids}
    open_experts = import_module("expert_worker.in_process").open_experts
    compute = open_experts(Path(configure.model_path), configure.dtype, configure.device, experts, progress)
    # Nobody is waited for here: there is no deadline to set.
    return Membership(1, LoopbackExchange(compute, experts), 1, list, lambda _: None)
