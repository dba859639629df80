"""All that a configuration, its checkpoint and the environment fix, wherever it is looked at. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config
from common.model_config import ModelConfig
from common.preflight import Finding
from common.preflight_group import group_findings
from common.preflight_npu import ExpertGroup, Generation, dispatch_findings, kernel_findings
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
