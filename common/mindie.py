"""The sections of MindIE's config.json, as frozen models: names, types, ranges, and what has no effect here.

A key that MindIE knows and expertmesh does not use carries `Ignored`; a key that nobody knows stays in the
model as an extra. `warnings_of` names both: MindIE's files load as they are, and nothing is ignored silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.alias_generators import to_camel


@dataclass(frozen=True, slots=True)
class Ignored:
    """Marks a field that is checked and has no effect. `reason` ends the sentence "PATH is ignored: ..."."""

    reason: str = "expertmesh does not need it"


class Section(BaseModel):
    """One JSON object of the file. Values are taken as they stand: 2.0 is no integer, 1 is no boolean."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="allow",
        alias_generator=to_camel,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Port = Annotated[int, Field(ge=0, le=65535)]
"""0 takes a free port."""
Unused = Annotated[Any, Ignored()]
NOT_BUILT = "it has no effect in this version"
ATTENTION = "attention runs on the router, undivided"


class ServerConfig(Section):
    """Where the router listens."""

    ip_address: str | None = None
    management_ip_address: str | None = None
    port: Port | None = None
    management_port: Port | None = None
    metrics_port: Annotated[Port | None, Ignored("no metrics are served in this version")] = None
    allow_all_zero_ip_listening: bool = False
    https_enabled: bool = False
    inter_comm_tls_enabled: bool = Field(default=False, alias="interCommTLSEnabled")
    max_link_num: Annotated[int | None, Ignored("ExpertMesh.maxQueuedRequests bounds what waits")] = Field(
        default=None, ge=1, le=4096
    )
    token_timeout: Annotated[int | None, Ignored("a client's deadline ends its request")] = Field(
        default=None, ge=1, le=3600
    )
    e2e_timeout: Annotated[int | None, Ignored("a client's deadline ends its request")] = Field(
        default=None, alias="e2eTimeout", ge=1, le=65535
    )
    infer_mode: Unused = None
    open_ai_support: Unused = None
    full_text_enabled: Unused = None
    inter_comm_port: Unused = None
    max_request_length: Unused = None


def _truncation(value: Any) -> int:
    if isinstance(value, bool):
        return -1 if value else 0
    if isinstance(value, int) and value in (-1, 0, 1):
        return value
    raise ValueError("must be true or -1 (cut on the right), false or 0 (refuse), or 1 (cut on the left)")


def _strictly_descending(table: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if not table:
        raise ValueError("must have at least one [tokens, factor] pair")
    if any(first[0] <= second[0] for first, second in pairwise(table)):
        raise ValueError("must be strictly descending by the first value of each pair")
    return table


# Not strict about the container alone: a JSON list is a tuple, its values are taken as they stand.
BufferFactor = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
]
"""[tokens, factor] of the receive buffers at ep_level 2."""


class DeepseekV2(Section):
    """`models.deepseekv2`: the parameters of expert parallelism."""

    model_config = ConfigDict(alias_generator=None)

    ep_level: int = Field(default=1, ge=1, le=2)
    enable_init_routing_cutoff: Annotated[bool, Ignored(NOT_BUILT)] = False
    topk_scaling_factor: Annotated[float | None, Ignored(NOT_BUILT)] = Field(default=None, gt=0, le=1)
    alltoall_ep_buffer_scale_factors: Annotated[
        Annotated[tuple[BufferFactor, ...], Field(strict=False)] | None, Ignored(NOT_BUILT)
    ] = None

    @field_validator("alltoall_ep_buffer_scale_factors")
    @classmethod
    def _descending(cls, table: tuple[tuple[int, float], ...] | None) -> tuple[tuple[int, float], ...] | None:
        return None if table is None else _strictly_descending(table)


DEEPSEEK_NAMES = ("deepseekv2", "deepseek_v2", "deepseek_v3", "deepseekv3")


def _models(value: Any) -> Any:
    """Take an object or a JSON string, and the family's other names for `deepseekv2`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("must be an object, or a string that holds a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError("must be an object, or a string that holds a JSON object")
    named = [name for name in DEEPSEEK_NAMES if name in value]
    if len(named) > 1:
        raise ValueError(f"must not hold both {named[0]} and {named[1]}: they mean the same")
    return {("deepseekv2" if key in named else key): entry for key, entry in value.items()}


class Models(Section):
    """`models`: parameters by model family."""

    model_config = ConfigDict(alias_generator=None)

    deepseekv2: DeepseekV2 = DeepseekV2()


class ModelConfig(Section):
    """`ModelConfig[0]`: the model and how it is divided. worldSize 0: experts in the router's process."""

    model_instance_type: Unused = None
    model_name: str = Field(
        default="deepseek", pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$", max_length=256
    )
    model_weight_path: str | None = Field(default=None, min_length=1, max_length=750)
    world_size: int | None = Field(default=None, ge=0, le=4096)
    cpu_mem_size: float | None = Field(default=None, gt=0, le=1 << 20)
    npu_mem_size: Annotated[int | None, Ignored("it sizes the cache on an NPU")] = None
    backend_type: Unused = None
    trust_remote_code: bool = False
    dp: Annotated[int | None, Ignored(ATTENTION)] = None
    tp: Annotated[int | None, Ignored(ATTENTION)] = None
    sp: Annotated[int | None, Ignored(ATTENTION)] = None
    cp: Annotated[int | None, Ignored(ATTENTION)] = None
    pp: Annotated[int | None, Ignored(ATTENTION)] = None
    moe_ep: int | None = Field(default=None, alias="moe_ep", ge=0)
    moe_tp: int | None = Field(default=None, alias="moe_tp", ge=1)
    plugin_params: Annotated[Any, Ignored(NOT_BUILT)] = Field(default=None, alias="plugin_params")
    models: Annotated[Models, BeforeValidator(_models)] = Models()


class ModelDeployConfig(Section):
    """`ModelDeployConfig`: lengths, and the one model that is served."""

    max_seq_len: int | None = Field(default=None, gt=0, le=1 << 24)
    max_input_token_len: int | None = Field(default=None, ge=1, le=4194304)
    truncation: Annotated[int, BeforeValidator(_truncation)] = 0
    model_configs: tuple[ModelConfig, ...] = Field(default=(ModelConfig(),), alias="ModelConfig")
    max_loras: Unused = None
    max_lora_rank: Unused = None
    lora_modules: Annotated[Any, Ignored("adapters are not supported")] = Field(
        default=None, alias="LoraModules"
    )

    @field_validator("model_configs")
    @classmethod
    def _one_model(cls, configs: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        if len(configs) != 1:
            raise ValueError(f"must have exactly 1 entry, not {len(configs)}: one model is served")
        return configs


class ScheduleConfig(Section):
    """`ScheduleConfig`: what one step may hold."""

    template_type: Unused = None
    template_name: Unused = None
    cache_block_size: int | None = Field(default=None, ge=1, le=128)
    max_prefill_tokens: int | None = Field(default=None, ge=1, le=4194304)
    max_batch_size: int | None = Field(default=None, ge=1, le=819200)
    max_iter_times: int | None = Field(default=None, ge=1)
    max_prefill_batch_size: Annotated[int | None, Ignored()] = Field(default=None, ge=0)
    prefill_time_ms_per_req: Unused = None
    decode_time_ms_per_req: Unused = None
    prefill_policy_type: Unused = None
    decode_policy_type: Unused = None
    max_preempt_count: Unused = None
    support_select_batch: Unused = None
    max_queue_delay_microseconds: Unused = None
    max_first_token_wait_time: Unused = None


class BackendConfig(Section):
    """`BackendConfig`: the usual place of ModelDeployConfig and ScheduleConfig."""

    backend_name: Unused = None
    model_instance_number: Unused = None
    npu_device_ids: Unused = None
    tokenizer_process_number: Unused = None
    multi_nodes_infer_enabled: Unused = None
    multi_nodes_infer_port: Unused = None
    inter_node_tls_enabled: bool = Field(default=False, alias="interNodeTLSEnabled")
    model_deploy_config: ModelDeployConfig | None = Field(default=None, alias="ModelDeployConfig")
    schedule_config: ScheduleConfig | None = Field(default=None, alias="ScheduleConfig")


def warnings_of(section: BaseModel, path: str = "") -> Iterator[str]:
    """Name every key of `section` that has no effect, with its JSON path."""
    for key in section.model_extra or {}:
        name = key if key.isprintable() else repr(key)
        yield f"{path}{name} is ignored: expertmesh does not know this key"
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        here = f"{path}{field.alias or name}"
        value = getattr(section, name)
        for mark in field.metadata:
            # What is at its default asks for nothing, for example dp 1 or npuMemSize -1.
            if isinstance(mark, Ignored) and value not in (
                field.default,
                1 if mark.reason == ATTENTION else None,
            ):
                yield f"{here} is ignored: {mark.reason}"
        if isinstance(value, BaseModel):
            yield from warnings_of(value, f"{here}.")
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                if isinstance(entry, BaseModel):
                    yield from warnings_of(entry, f"{here}[{index}].")
