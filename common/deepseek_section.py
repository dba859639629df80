"""`models.deepseekv2` of MindIE's config.json: the parameters of expert parallelism."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from common.row_limits import DEFAULT_BUFFER_FACTORS
from common.section import Ignored, IgnoredBool, Section

BALANCING = Ignored("section ExpertMesh has the settings for copies of experts")
FUSED = Ignored("ExpertMesh.groupedMatmul says which kernels compute the experts")
NO_COLLECTIVE_BUFFERS = Ignored("the links of this version have no buffers of a fixed size")
NO_OPTION_OF_THE_ROUTER = Ignored("attention and dense layers run on the router, undivided")

# Not strict about the container alone: a JSON list is a tuple, its values are taken as they stand.
BufferFactor = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
]
"""[tokens, factor] of the receive buffers at ep_level 2."""


def _boolean(value: Any) -> Any:
    """Take the text of a boolean, which is how MindIE writes these keys itself."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


IgnoredBoolText = Annotated[bool, BeforeValidator(_boolean), NO_OPTION_OF_THE_ROUTER]
Tensors = Annotated[int, NO_OPTION_OF_THE_ROUTER]


class Eplb(Section, alias_generator=None):
    """`eplb`: MindIE's balancing of experts."""

    level: Annotated[int, BALANCING] = Field(default=0, ge=0, le=3)
    num_redundant_experts: Annotated[int, BALANCING] = Field(default=0, ge=0, le=512)
    aggregate_threshold: Annotated[int, BALANCING] = Field(default=128, ge=1)
    buffer_expert_layer_num: Annotated[int | None, BALANCING] = Field(default=None, ge=1)
    num_expert_update_ready_countdown: Annotated[int, BALANCING] = Field(default=16, ge=1)
    expert_map_file: Annotated[str, BALANCING] = ""


class CommunicationBackend(Section, alias_generator=None):
    """`communication_backend`: MindIE's choice of the library for ep_level 2."""

    prefill: Annotated[Literal["lccl", "hccl"], Ignored("the device decides how rows travel")] = "lccl"
    decode: Annotated[Literal["lccl", "hccl"], Ignored("the device decides how rows travel")] = "lccl"


class H3p(Section, alias_generator=None):
    """`h3p`: which parts of a layer MindIE divides by tokens."""

    enable_qkvdown_dp: IgnoredBoolText = True
    enable_gating_dp: IgnoredBoolText = True
    enable_shared_expert_dp: IgnoredBoolText = False
    enable_shared_expert_overlap: IgnoredBoolText = False


class ParallelOptions(Section, alias_generator=None):
    """`parallel_options`: MindIE's buffers, and how it divides dense layers."""

    o_proj_local_tp: Tensors = Field(default=-1, ge=-1)
    lm_head_local_tp: Tensors = Field(default=-1, ge=-1)
    dense_mlp_local_tp: Tensors = Field(default=-1, ge=-1)
    hccl_buffer: Annotated[int, NO_COLLECTIVE_BUFFERS] = Field(default=128, ge=1)
    hccl_moe_ep_buffer: Annotated[int, NO_COLLECTIVE_BUFFERS] = Field(default=512, ge=512)
    hccl_moe_tp_buffer: Annotated[int, NO_COLLECTIVE_BUFFERS] = Field(default=64, ge=1)


class KvCacheOptions(Section, alias_generator=None):
    """`kv_cache_options`: the layout of the KV cache on an NPU."""

    enable_nz: IgnoredBool = False


class DeepseekV2(Section, alias_generator=None):
    """`models.deepseekv2`: the exchange of hidden states, and what MindIE tunes beside it."""

    ep_level: int = Field(default=1, ge=1, le=2)
    enable_init_routing_cutoff: bool = False
    topk_scaling_factor: float | None = Field(default=None, gt=0, le=1)
    alltoall_ep_buffer_scale_factors: Annotated[tuple[BufferFactor, ...], Field(strict=False)] = (
        DEFAULT_BUFFER_FACTORS
    )
    eplb: Eplb = Eplb()
    communication_backend: CommunicationBackend = CommunicationBackend()
    h3p: H3p = H3p()
    parallel_options: ParallelOptions = ParallelOptions()
    kv_cache_options: KvCacheOptions = KvCacheOptions()
    enable_dispatch_combine_v2: Annotated[bool, FUSED] = True
    enable_gmmswigluquant: Annotated[bool, FUSED] = False
    enable_oproj_prefetch: Annotated[bool, FUSED] = False
    enable_mlapo_prefetch: Annotated[bool, FUSED] = False
    enable_swiglu_quant_for_shared_experts: Annotated[bool, FUSED] = False
    mlp_full_tp: Annotated[bool, NO_OPTION_OF_THE_ROUTER] = False
    num_dangling_shared_experts: Annotated[int, BALANCING] = Field(default=0, ge=-1)
    mix_shared_routing: Annotated[bool, BALANCING] = False

    @field_validator("alltoall_ep_buffer_scale_factors")
    @classmethod
    def _strictly_descending(cls, table: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        if not table:
            raise ValueError("must have at least one [tokens, factor] pair")
        if any(first[0] <= second[0] for first, second in pairwise(table)):
            raise ValueError("must be strictly descending by the first value of each pair")
        return table
