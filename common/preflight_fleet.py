"""All that a configuration, its checkpoint and the environment fix, wherever it is looked at. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config
from common.model_config import ModelConfig
from common.npu_limits import ExchangeShape, choose_exchange
from common.preflight import Finding
from common.preflight_group import group_findings
from common.preflight_npu import (
    DEFAULT_BUFFER_MB,
    ExpertGroup,
    Generation,
    dispatch_findings,
    kernel_findings,
)
from common.rank_table import RankTable

ALL_TO_ALL = 2


def fixed_findings(
    config: Config, model: ModelConfig, table: RankTable | None, hccl_buffer_mb: int | None
) -> Iterator[Finding]:
    """Check what does not depend on the machine: the group, the rank table, Ascend's operators.

    Args:
        table: of RANK_TABLE_FILE; None without one.
        hccl_buffer_mb: HCCL_BUFFSIZE; None: not set.
    """
    yield from group_findings(config, model)
    if config.experts_in_process:
        return
    if table is not None:
        yield Finding(
            what="ModelConfig[0].worldSize",
            needed=f"the number of ranks in the rank table ({len(table.ranks)})",
            found=str(config.world_size),
            is_met=config.world_size == len(table.ranks),
            remedy=f"set it to {len(table.ranks)}, or correct the table that RANK_TABLE_FILE names",
        )
    if config.device == "npu":
        group = _expert_group(config, model)
        yield from kernel_findings(group)
        if config.ep_level == ALL_TO_ALL:
            generation: Generation = "A3" if table is not None and table.is_super_node else "A2"
            yield from dispatch_findings(group, generation, hccl_buffer_mb)
            yield _carrier(config, model, generation, hccl_buffer_mb)


def _carrier(
    config: Config, model: ModelConfig, generation: Generation, hccl_buffer_mb: int | None
) -> Finding:
    """Which operator will carry rows, and why the others will not. Never unmet: one of them always can."""
    choice = choose_exchange(
        ExchangeShape(
            generation,
            config.moe_ep,
            model.n_routed_experts + config.redundant_experts,
            model.num_experts_per_tok,
            model.hidden_size,
            config.max_prefill_tokens,
            model.dtype_name if config.dtype == "auto" else config.dtype,
            buffer_mb=DEFAULT_BUFFER_MB if hccl_buffer_mb is None else hccl_buffer_mb,
        )
    )
    return Finding(
        what=f"what carries rows at ep_level 2 on {generation}",
        needed="nothing else",
        found=choice.text,
        is_met=True,
        remedy="",
    )


def _expert_group(config: Config, model: ModelConfig) -> ExpertGroup:
    return ExpertGroup(
        n_routed_experts=model.n_routed_experts + config.redundant_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_groups=model.num_groups,
        ep_size=config.moe_ep,
        # The operators are for steps of answers; steps of prompts are too large for them.
        most_tokens=-(-config.max_batch_size // config.micro_batches),
    )
