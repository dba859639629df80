"""Whether the routed experts can be dealt out to the workers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from common.config import Config
from common.model_config import ModelConfig
from common.preflight import Finding


def group_findings(config: Config, model: ModelConfig) -> Iterator[Finding]:
    """Compare the configured group with the checkpoint; nothing where the experts stay with the router."""
    if config.experts_in_process:
        return
    experts, workers = model.n_routed_experts, config.moe_ep
    if config.redundant_experts:
        places = experts + config.redundant_experts
        yield Finding(
            what="ExpertMesh.redundantExperts",
            needed=f"a number that makes n_routed_experts ({experts}) + it divisible by moe_ep ({workers})",
            found=str(config.redundant_experts),
            is_met=places % workers == 0,
            remedy=f"set it to {config.redundant_experts + -places % workers}, or choose another worldSize",
        )
        return
    yield Finding(
        what="ModelConfig[0].moe_ep",
        needed=f"a divisor of the checkpoint's n_routed_experts ({experts})",
        found=str(workers),
        is_met=experts % workers == 0,
        remedy="choose another worldSize or moe_ep",
    )
