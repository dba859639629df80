"""`ModelDeployConfig` of MindIE's config.json: lengths, and the one model that is served."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, field_validator

from common.deepseek_section import DeepseekV2
from common.section import Ignored, Section, matching

ATTENTION = Ignored("attention runs on the router, undivided")
NO_TRANSFER = Ignored("one router computes prompts and answers: no KV cache is transferred")
NO_ADAPTERS = Ignored("adapters are not supported")
NO_PLUGINS = Ignored("plugins, speculative decoding among them, are not built in this version")
Degree = Annotated[int, Field(ge=-1), ATTENTION]

DEEPSEEK_NAMES = ("deepseekv2", "deepseek_v2", "deepseek_v3", "deepseekv3")
"""What the section is called in MindIE's files; the first is its own name for all of them."""


def _models(value: Any) -> dict[str, Any]:
    """Take an object, or a string that holds one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise ValueError("must be an object, or a string that holds a JSON object")
    named = [name for name in DEEPSEEK_NAMES if name in value]
    if len(named) > 1:
        raise ValueError(f"must not hold both {named[0]} and {named[1]}: they mean the same")
    return value


def _truncation(value: Any) -> int:
    if isinstance(value, bool):
        return -1 if value else 0
    if isinstance(value, int) and value in (-1, 0, 1):
        return value
    raise ValueError("must be true or -1 (cut on the right), false or 0 (refuse), or 1 (cut on the left)")


class Models(Section, alias_generator=None):
    """`models`: parameters by model family."""

    deepseekv2: DeepseekV2 = Field(default=DeepseekV2(), validation_alias=AliasChoices(*DEEPSEEK_NAMES))


class ModelConfig(Section):
    """`ModelConfig[0]`: the model and how it is divided. worldSize 0: experts in the router's process."""

    model_name: Annotated[
        str,
        matching(
            r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?",
            "must be letters, digits, dots, dashes and underscores, and begin and end with a letter or digit",
        ),
    ] = Field(default="deepseek", max_length=256)
    model_weight_path: str | None = Field(default=None, min_length=1, max_length=750)
    world_size: int | None = Field(default=None, ge=0, le=4096)
    moe_ep: int | None = Field(default=None, alias="moe_ep", ge=0)
    moe_tp: int | None = Field(default=None, alias="moe_tp", ge=1)
    models: Annotated[Models, BeforeValidator(_models)] = Models()
    cpu_mem_size: float = Field(default=1, gt=0, le=1 << 20)
    trust_remote_code: bool = False
    npu_mem_size: int = Field(default=-1, ge=-1)
    model_instance_type: Annotated[
        Literal["Standard", "StandardMock", "TargetModel", "AssistantModel"],
        Ignored("the model is always computed, and alone"),
    ] = "Standard"
    backend_type: Annotated[
        Literal["atb", "ms", "torch"], Ignored("ExpertMesh.device says what computes")
    ] = "atb"
    dp: Degree = 1
    tp: Degree = 1
    sp: Degree = 1
    cp: Degree = 1
    pp: Degree = 1
    plugin_params: Annotated[Any, NO_PLUGINS] = Field(default="", alias="plugin_params")
    async_scheduler_wait_time: Annotated[int, Ignored()] = Field(
        default=120, alias="async_scheduler_wait_time", ge=0
    )
    kv_trans_timeout: Annotated[int, NO_TRANSFER] = Field(default=10, alias="kv_trans_timeout")
    kv_link_timeout: Annotated[int, NO_TRANSFER] = Field(default=1080, alias="kv_link_timeout")


class ModelDeployConfig(Section):
    """`ModelDeployConfig`: the model, and how long its sequences may be."""

    max_seq_len: int | None = Field(default=None, ge=2, le=1 << 24)
    max_input_token_len: int | None = Field(default=None, ge=1, le=4194304)
    truncation: Annotated[int, BeforeValidator(_truncation)] = 0
    model_configs: tuple[ModelConfig, ...] = Field(default=(ModelConfig(),), alias="ModelConfig")
    max_loras: Annotated[int, NO_ADAPTERS] = Field(default=0, ge=0)
    max_lora_rank: Annotated[int, NO_ADAPTERS] = Field(default=0, ge=0)
    lora_modules: Annotated[Any, NO_ADAPTERS] = Field(default=None, alias="LoraModules")
    speculation_gamma: Annotated[int, NO_PLUGINS] = Field(default=0, ge=0)

    @field_validator("model_configs")
    @classmethod
    def _one_model(cls, configs: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        if len(configs) != 1:
            raise ValueError(f"must have exactly 1 entry, not {len(configs)}: one model is served")
        return configs
