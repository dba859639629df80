"""What a worker and the router will hold in memory, against what there is. Pure.

Shapes: R rows, D hidden_size, F moe_intermediate_size, T tokens of a micro-batch, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config import Config
from common.kv_cache_size import fit_kv_cache
from common.model_config import ModelConfig
from common.preflight import MEBIBYTE, Finding, size
from common.preflight_npu import DEFAULT_BUFFER_MB
from common.row_limits import RowLimits
from common.weight_sizes import ITEM_BYTES, WeightSizes, computed_dtype

CHOICE_BYTES = 12
"""At ep_level 1 each choice of a token arrives as an id (8 bytes) and a weight (4)."""
SUM_BYTES = 8
"""Partial sums are in float64."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of one process, by what they are for.

    Attributes:
        buffers: of a worker: the rows of one micro-batch, and what is computed of them on the way.
        kv_cache: of the router, when it is full.
    """

    weights: int
    buffers: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.buffers + self.kv_cache

    def __str__(self) -> str:
        parts = {"weights": self.weights, "buffers": self.buffers, "KV cache": self.kv_cache}
        named = [f"{size(number)} of {name}" for name, number in parts.items() if number]
        return f"{size(self.total)} ({', '.join(named)})" if named else size(0)


def memory_finding(who: str, device: str, need: MemoryNeed, free_bytes: int, remedy: str) -> Finding:
    """Compare what somebody needs with what is free.

    Args:
        who: "the router", "expert worker worker-3".
        device: whose memory it is; "cpu" means this machine's.
    """
    where = "this machine" if device == "cpu" else device
    return Finding(
        what=f"the free memory of {where} for {who}",
        needed=str(need),
        found=size(free_bytes),
        is_met=need.total <= free_bytes,
        remedy=remedy,
    )


def router_need(config: Config, model: ModelConfig, sizes: WeightSizes) -> MemoryNeed:
    """Its own weights, those of all experts where they stay with it, and its KV cache when it is full."""
    weights = sizes.router_bytes()
    if config.experts_in_process:
        weights += sizes.shard_bytes(dict.fromkeys(model.moe_layer_ids, tuple(range(model.n_routed_experts))))
    cache = fit_kv_cache(
        model,
        config.kv_cache_bytes,
        config.block_size,
        ITEM_BYTES[computed_dtype(config, model)],
        config.max_seq_len,
        config.max_batch_size,
    )
    return MemoryNeed(weights, kv_cache=cache.num_bytes)


def worker_need(
    config: Config, model: ModelConfig, sizes: WeightSizes, hccl_buffer_mb: int | None = None
) -> MemoryNeed:
    """What the worker with the largest share of experts needs, before anybody knows where each of them goes.

    Args:
        hccl_buffer_mb: HCCL_BUFFSIZE; None: not set.
    """
    share = min(_share(config, model), model.n_routed_experts)
    weights = sizes.shard_bytes(dict.fromkeys(model.moe_layer_ids, tuple(range(share))))
    return MemoryNeed(weights, buffers=buffer_bytes(config, model, hccl_buffer_mb))


def _share(config: Config, model: ModelConfig) -> int:
    """Experts of one layer that the worker with most of them holds, replicas included."""
    return -(-(model.n_routed_experts + config.redundant_experts) // max(config.moe_ep, 1))


def most_tokens(config: Config) -> int:
    """Tokens of the largest micro-batch: a full step of prompts, and an answer's token of every request."""
    return -(-(config.max_prefill_tokens + config.max_batch_size) // config.micro_batches)


def buffer_bytes(config: Config, model: ModelConfig, hccl_buffer_mb: int | None) -> int:
    """What a worker needs beside its weights, for the largest micro-batch of one router.

    R rows at once, by the routing cutoff (ep_level 1) or the receive buffer (ep_level 2): they come in
    [R, D], become [R, 2 F] and [R, F] and go out [R, D]; at ep_level 1 all T tokens arrive, with their
    choices, and their sums go back. On an NPU HCCL takes HCCL_BUFFSIZE twice, to send and to receive.
    """
    tokens, item_bytes = most_tokens(config), ITEM_BYTES[computed_dtype(config, model)]
    limits = RowLimits(
        model.num_experts_per_tok,
        max(config.moe_ep, 1),
        config.alltoall_ep_buffer_scale_factors,
        config.cutoff_factor,
        config.cutoff_min_rows,
    )
    is_level_1 = config.ep_level == 1
    rows = limits.pass_rows(tokens) if is_level_1 else limits.round_rows(tokens)
    # A token chooses an expert once.
    rows = min(rows, tokens * min(model.num_experts_per_tok, _share(config, model)))
    num_bytes = rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size) * item_bytes
    if is_level_1:
        row = model.hidden_size * (item_bytes + SUM_BYTES) + model.num_experts_per_tok * CHOICE_BYTES
        num_bytes += tokens * row
    if config.device == "npu":
        num_bytes += 2 * (DEFAULT_BUFFER_MB if hccl_buffer_mb is None else hccl_buffer_mb) * MEBIBYTE
    return num_bytes
