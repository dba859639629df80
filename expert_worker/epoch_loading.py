"""Prepares an epoch beside the running ones: loads what is missing, joins the link, hands both over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import CheckpointError, ExpertMeshError
from common.exchange import ALL_GATHER, ALL_TO_ALL
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.preflight import require
from common.preflight_memory import MemoryNeed, memory_finding
from common.quantization.row_format import int8_layers
from expert_worker.experts import LayerExperts
from expert_worker.joining import JoinGroup, JoinLink, experts_of
from expert_worker.messages import (
    Check,
    Checked,
    Linked,
    Loaded,
    Loading,
    Prepare,
    PrepareFailed,
    Refused,
)
from expert_worker.shard import DTYPES, Shard, ShardSource

logger = logging.getLogger(__name__)

LOADING_INTERVAL_S = 0.2
"""Shortest time between two Loading messages."""
NOT_SAID = 0
"""ep_level of a router that does not say which it begins with."""

Layers = dict[int, LayerExperts]
"""The experts of an epoch: layer_id -> experts."""


@dataclass(frozen=True, slots=True)
class _Format:
    """A checkpoint's configuration, and its layers whose rows travel in int8."""

    config: ModelConfig
    int8_layers: frozenset[int]


class Superseded(ExpertMeshError):
    """A later epoch of the same term was asked for meanwhile."""


class EpochLoading:
    """Takes Prepare messages, one thread each; only the last of a term gets as far as its link."""

    def __init__(
        self,
        shard: Shard,
        joining: JoinLink | JoinGroup,
        on_loaded: Callable[[int, int, Layers, int], None],
        send: Callable[[object], None],
        free_memory: Callable[[], int],
        held_buffer_bytes: Callable[[int], int],
    ) -> None:
        """Prepare for epochs.

        Args:
            shard: the experts in memory.
            joining: how a router is joined.
            on_loaded: gets (term, epoch, layers, buffer_bytes) before the epoch's first rows can arrive.
            send: to the agent, from any thread.
            free_memory: bytes that weights can still take.
            held_buffer_bytes: what the epoch in force of a term has for buffers already.
        """
        self._shard = shard
        self._joining = joining
        self._on_loaded = on_loaded
        self._send = send
        self._free_memory = free_memory
        self._held_buffer_bytes = held_buffer_bytes
        self._formats: dict[str, _Format] = {}
        self._newest: dict[int, int] = {}
        # Epochs load one after another: two at a time would hold what neither needs any more.
        self._turn = threading.Lock()

    def prepare(self, message: Prepare) -> None:
        """Begin; answered by Loading..., Loaded, Linked, or by Refused or PrepareFailed."""
        self._newest[message.term] = message.epoch
        threading.Thread(
            target=self._run, args=(message,), name=f"prepare-{message.term}-{message.epoch}", daemon=True
        ).start()

    def check(self, message: Check) -> None:
        """Say whether an epoch would be refused."""
        refusal = self._refusal(message.term, message.ep_level, message.buffer_bytes)
        self._send(Checked(message.check_id, refusal))

    def forget(self, term: int) -> None:
        """A router is gone: give up what is being prepared for it."""
        self._newest.pop(term, None)

    def _run(self, message: Prepare) -> None:
        try:
            with self._turn:
                refusal = self._refusal_of(message)
                layers = {} if refusal else self._load(message)
            if refusal:
                self._send(Refused(message.term, message.epoch, refusal))
            else:
                self._join(message, layers)
        except Exception as error:
            # Whatever went wrong, the agent must hear of it; weights and links in force are untouched.
            if not isinstance(error, ExpertMeshError):
                logger.error("preparing epoch %d failed", message.epoch, exc_info=error)
            self._send(PrepareFailed(message.term, message.epoch, type(error).__name__, str(error)))

    def _refusal_of(self, message: Prepare) -> str:
        """Why an epoch is refused; memory is looked at later where weights are missing."""
        holds = self._shard.holds(ShardSource(Path(message.model_path), message.dtype), experts_of(message))
        return self._refusal(message.term, message.ep_level, message.buffer_bytes if holds else 0)

    def _refusal(self, term: int, ep_level: int, buffer_bytes: int) -> str:
        """Why an epoch is refused, empty where it is not."""
        if ep_level not in (NOT_SAID, ALL_GATHER, ALL_TO_ALL):
            return f"ep_level is {ep_level}, but this worker knows {ALL_GATHER} and {ALL_TO_ALL} only"
        need = MemoryNeed(0, buffers=self._more_buffers(term, buffer_bytes))
        if not need.total:
            return ""
        remedy = "lower maxPrefillTokens, maxBatchSize or the buffer factors, or free memory"
        finding = memory_finding("larger buffers", self._shard.device, need, self._free_memory(), remedy)
        logger.info("memory: %s", finding.sentence)
        return "" if finding.is_met else finding.sentence

    def _more_buffers(self, term: int, buffer_bytes: int) -> int:
        """What an epoch takes for buffers beyond those of the one it follows, which end when it begins."""
        return max(buffer_bytes - self._held_buffer_bytes(term), 0)

    def _load(self, message: Prepare) -> Layers:
        self._check_row_format(message)
        sent_at = 0.0

        def on_progress(loaded_bytes: int, total_bytes: int) -> None:
            nonlocal sent_at
            self._check(message)
            if sent_at == 0.0:
                self._check_memory(loaded_bytes, total_bytes, message)
            now = time.monotonic()
            if now - sent_at >= LOADING_INTERVAL_S:
                sent_at = now
                self._send(Loading(message.term, message.epoch, loaded_bytes, total_bytes))

        source = ShardSource(Path(message.model_path), message.dtype)
        layers = self._shard.hold(source, experts_of(message), on_progress)
        self._on_loaded(message.term, message.epoch, layers, message.buffer_bytes)
        self._send(
            Loaded(
                message.term, message.epoch, self._shard.loaded_bytes, self._shard.describe_grouped_matmul()
            )
        )
        return layers

    def _check_memory(self, loaded_bytes: int, total_bytes: int, message: Prepare) -> None:
        """Compare what is about to be read, and the buffers, with what is free."""
        if loaded_bytes == total_bytes:
            return
        buffers = self._more_buffers(message.term, message.buffer_bytes)
        need = MemoryNeed(total_bytes - loaded_bytes, buffers=buffers)
        remedy = "use more expert workers, free memory, or use a machine with more of it"
        who = f"the expert worker of ep_rank {message.ep_rank}"
        finding = memory_finding(who, self._shard.device, need, self._free_memory(), remedy)
        logger.info("memory: %s", finding.sentence)
        require([finding])

    def _join(self, message: Prepare, layers: Layers) -> None:
        config = self._format(message.model_path).config
        shape = RowShape(
            config.hidden_size,
            config.num_experts_per_tok,
            DTYPES[message.dtype],
            frozenset(message.int8_layers),
        )
        self._joining.join(message, shape, layers, lambda: self._check(message))
        self._send(Linked(message.term, message.epoch))

    def _check(self, message: Prepare) -> None:
        if self._newest.get(message.term) != message.epoch:
            raise Superseded(f"epoch {message.epoch} of term {message.term} was superseded or given up")

    def _check_row_format(self, message: Prepare) -> None:
        """Refuse rows in another form than the experts here take: they would be computed to other bits."""
        ours, theirs = self._format(message.model_path).int8_layers, set(message.int8_layers)
        if ours != theirs:
            raise CheckpointError(
                f"the router sends rows of layers {sorted(theirs)} in int8, but in {message.model_path} the "
                f"layers of W8A8_DYNAMIC experts are {sorted(ours)}: give router and workers the same "
                "checkpoint"
            )

    def _format(self, model_path: str) -> _Format:
        """What a checkpoint says of itself, read once: an epoch that needs no weights reads no file."""
        if model_path not in self._formats:
            config = ModelConfig.from_directory(Path(model_path))
            self._formats[model_path] = _Format(config, int8_layers(Path(model_path), config))
        return self._formats[model_path]
