"""Prepares an epoch beside the running ones: loads what is missing, joins the link, hands both over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common.errors import CheckpointError, ExpertMeshError
from common.exchange.routing import RowShape
from common.model_config import ModelConfig
from common.preflight import require
from common.preflight_memory import MemoryNeed, memory_finding
from common.quantization.row_format import int8_layers
from expert_worker.experts import LayerExperts
from expert_worker.joining import JoinGroup, JoinLink, experts_of
from expert_worker.messages import Linked, Loaded, Loading, Prepare, PrepareFailed
from expert_worker.shard import DTYPES, Shard, ShardSource

logger = logging.getLogger(__name__)

LOADING_INTERVAL_S = 0.2
"""Shortest time between two Loading messages."""

Layers = dict[int, LayerExperts]
"""The experts of an epoch: layer_id -> experts."""


class Superseded(ExpertMeshError):
    """A later epoch of the same term was asked for meanwhile."""


class EpochLoading:
    """Takes Prepare messages, one thread each; only the last of a term gets as far as its link."""

    def __init__(
        self,
        shard: Shard,
        joining: JoinLink | JoinGroup,
        on_loaded: Callable[[int, int, Layers], None],
        send: Callable[[object], None],
        free_memory: Callable[[], int],
    ) -> None:
        """Prepare for epochs.

        Args:
            shard: the experts in memory.
            joining: how a router is joined.
            on_loaded: gets (term, epoch, layers) before the first rows of the epoch can arrive.
            send: to the agent, from any thread.
            free_memory: bytes that weights can still take.
        """
        self._shard = shard
        self._joining = joining
        self._on_loaded = on_loaded
        self._send = send
        self._free_memory = free_memory
        self._newest: dict[int, int] = {}
        # Epochs load one after another: two at a time would hold what neither needs any more.
        self._turn = threading.Lock()

    def prepare(self, message: Prepare) -> None:
        """Begin; answered by Loading..., Loaded, Linked, or by PrepareFailed."""
        self._newest[message.term] = message.epoch
        threading.Thread(
            target=self._run, args=(message,), name=f"prepare-{message.term}-{message.epoch}", daemon=True
        ).start()

    def forget(self, term: int) -> None:
        """A router is gone: give up what is being prepared for it."""
        self._newest.pop(term, None)

    def _run(self, message: Prepare) -> None:
        try:
            with self._turn:
                self._load(message)
            self._join(message)
        except Exception as error:
            # Whatever went wrong, the agent must hear of it; weights and links in force are untouched.
            if not isinstance(error, ExpertMeshError):
                logger.error("preparing epoch %d failed", message.epoch, exc_info=error)
            self._send(PrepareFailed(message.term, message.epoch, type(error).__name__, str(error)))

    def _load(self, message: Prepare) -> None:
        _check_row_format(message)
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
        self._on_loaded(message.term, message.epoch, layers)
        self._send(
            Loaded(
                message.term, message.epoch, self._shard.loaded_bytes, self._shard.describe_grouped_matmul()
            )
        )

    def _check_memory(self, loaded_bytes: int, total_bytes: int, message: Prepare) -> None:
        """Compare what is about to be read, and the buffers, with what is free."""
        if loaded_bytes == total_bytes:
            return
        # A worker that has served has its buffers already.
        need = MemoryNeed(total_bytes - loaded_bytes, buffers=0 if loaded_bytes else message.buffer_bytes)
        remedy = "use more expert workers, free memory, or use a machine with more of it"
        who = f"the expert worker of ep_rank {message.ep_rank}"
        finding = memory_finding(who, self._shard.device, need, self._free_memory(), remedy)
        logger.info("memory: %s", finding.sentence)
        require([finding])

    def _join(self, message: Prepare) -> None:
        config = ModelConfig.from_directory(Path(message.model_path))
        shape = RowShape(
            config.hidden_size,
            config.num_experts_per_tok,
            DTYPES[message.dtype],
            frozenset(message.int8_layers),
        )
        self._joining.join(message, shape, lambda: self._check(message))
        self._send(Linked(message.term, message.epoch))

    def _check(self, message: Prepare) -> None:
        if self._newest.get(message.term) != message.epoch:
            raise Superseded(f"epoch {message.epoch} of term {message.term} was superseded or given up")


def _check_row_format(message: Prepare) -> None:
    """Refuse rows in another form than the experts here take: they would be computed to other bits."""
    model_path = Path(message.model_path)
    ours, theirs = int8_layers(model_path, ModelConfig.from_directory(model_path)), set(message.int8_layers)
    if ours != theirs:
        raise CheckpointError(
            f"the router sends rows of layers {sorted(theirs)} in int8, but in {model_path} the layers of "
            f"W8A8_DYNAMIC experts are {sorted(ours)}: give router and workers the same checkpoint"
        )
