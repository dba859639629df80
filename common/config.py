"""What the operator chose: a JSON file in MindIE's layout plus section `ExpertMesh`, as one frozen `Config`.

`load_config(path, overrides)`: defaults < file < EXPERTMESH_... of the environment < overrides. These map
keys to values: {"ServerConfig.port": 0, "ModelConfig.worldSize": 4, "ExpertMesh.fleetPort": 0}.
`resolve` says in addition where each value came from. docs/configuration.md describes every key.

| field of Config                  | from                                      | default                    |
|----------------------------------|-------------------------------------------|----------------------------|
| host, port                       | ServerConfig.ipAddress, .port             | 127.0.0.1, 1025 (0: free)  |
| management_host                  | ServerConfig.managementIpAddress          | 127.0.0.1                  |
| management_port                  | ServerConfig.managementPort               | 1026 (0: free)             |
| model_name                       | ModelConfig.modelName                     | "deepseek"                 |
| model_path                       | ModelConfig.modelWeightPath               | None: not said             |
| world_size                       | ModelConfig.worldSize                     | moe_ep * moe_tp, or 2      |
| moe_ep, moe_tp                   | ModelConfig.moe_ep, .moe_tp               | world_size / the other, 1  |
| ep_level                         | models.deepseekv2, by the same name       | 1                          |
| enable_init_routing_cutoff       | models.deepseekv2, by the same name       | False                      |
| topk_scaling_factor              | models.deepseekv2, by the same name       | None                       |
| alltoall_ep_buffer_scale_factors | models.deepseekv2, by the same name       | MindIE's documented table  |
| kv_cache_bytes                   | ModelConfig.cpuMemSize, .npuMemSize (GB)  | 1 GB                       |
| max_seq_len                      | ModelDeployConfig.maxSeqLen               | None: as the checkpoint    |
| max_input_token_len              | ModelDeployConfig.maxInputTokenLen        | None: max_seq_len - 1      |
| truncation                       | ModelDeployConfig.truncation              | 0 (-1: cut right, 1: left) |
| block_size                       | ScheduleConfig.cacheBlockSize             | 128                        |
| max_prefill_tokens               | ScheduleConfig.maxPrefillTokens           | 8192                       |
| max_batch_size                   | ScheduleConfig.maxBatchSize               | 200                        |
| max_iter_times                   | ScheduleConfig.maxIterTimes               | None: no bound on answers  |
| fleet_host, fleet_port           | ExpertMesh.fleetAddress, .fleetPort       | data_address, 1028         |
| data_address                     | ExpertMesh.dataAddress                    | 127.0.0.1                  |
| device, dtype                    | ExpertMesh.device, .dtype                 | "cpu", "auto"              |
| device_id                        | ExpertMesh.deviceId                       | None: not said             |
| exchange                         | ExpertMesh.exchange                       | "links" on a CPU           |
| same_host_transport              | ExpertMesh.sameHostTransport              | "auto"                     |
| micro_batches                    | ExpertMesh.microBatches                   | 1: a step is not cut       |
| chunk_rows                       | ExpertMesh.chunkRows                      | 4096 (0: not cut)          |
| redundant_experts                | ExpertMesh.redundantExperts               | 0                          |
| expert_load_file                 | ExpertMesh.expertLoadFile                 | None: loads unknown        |
| grouped_matmul, topology         | ExpertMesh.groupedMatmul, .topology       | "auto"                     |
| cutoff_min_rows                  | ExpertMesh.cutoffMinRows                  | 4096                       |
| experts_in_process               | ExpertMesh.expertsInProcess, worldSize 0  | False; True: no workers    |
| threads                          | ExpertMesh.threads                        | None: torch's default      |
| register_timeout_s               | ExpertMesh.registerTimeoutSeconds         | 60.0                       |
| deadline_floor_s                 | ExpertMesh.deadlineFloorSeconds           | 0.25                       |
| recovery_timeout_s               | ExpertMesh.recoveryTimeoutSeconds         | 120.0 (0: do not wait)     |
| drain_timeout_s                  | ExpertMesh.drainTimeoutSeconds            | 30.0                       |
| trace_file                       | ExpertMesh.traceFile                      | None: nothing is recorded  |
| log_level                        | ExpertMesh.logLevel                       | "info"                     |
| max_queued_requests              | ExpertMesh.maxQueuedRequests              | 1000                       |
| fleet_token_file                 | ExpertMesh.fleetTokenFile                 | None; see fleet_token()    |
| router                           | ExpertMesh.router (workers: HOST:PORT)    | None: not said             |
| worker_id                        | ExpertMesh.workerId                       | None: the worker's choice  |
| agent_host, agent_port           | ExpertMesh.agentAddress, .agentPort       | data_address, 0            |
| advertise_address                | ExpertMesh.advertiseAddress (HOST:PORT)   | None: as agent_host        |
| state_dir                        | ExpertMesh.stateDir                       | None: nothing is kept      |
| warnings                         | what is in the file and does not act      | ()                         |
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

from common.config_file import Sections, put, read_document, variables_of
from common.config_origin import Origin, origins_of
from common.config_problems import validated
from common.config_rules import group_of, problems_of, warnings
from common.errors import ConfigError
from common.json_file import shown_path
from common.reload_class import DRAIN, FLEET, HOT, ROUTER, WORKERS, ReloadClass

TOKEN_VARIABLE = "EXPERTMESH_FLEET_TOKEN"
GIGABYTE = 1 << 30


@dataclass(frozen=True, slots=True)
class At:
    """The key a field of `Config` is taken from, as overrides name it, and how a change takes effect."""

    key: str
    reload: ReloadClass


class Config(BaseModel):
    """Everything the operator chose; the table at the top of this file names each field's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    host: Annotated[str, At("ServerConfig.ipAddress", ROUTER)]
    port: Annotated[int, At("ServerConfig.port", ROUTER)]
    management_host: Annotated[str, At("ServerConfig.managementIpAddress", ROUTER)]
    management_port: Annotated[int, At("ServerConfig.managementPort", ROUTER)]
    model_name: Annotated[str, At("ModelConfig.modelName", HOT)]
    model_path: Annotated[str | None, At("ModelConfig.modelWeightPath", FLEET)]
    world_size: Annotated[int, At("ModelConfig.worldSize", FLEET)]
    moe_ep: Annotated[int, At("ModelConfig.moe_ep", FLEET)]
    moe_tp: Annotated[int, At("ModelConfig.moe_tp", FLEET)]
    ep_level: Annotated[int, At("models.deepseekv2.ep_level", HOT)]
    enable_init_routing_cutoff: Annotated[bool, At("models.deepseekv2.enable_init_routing_cutoff", HOT)]
    topk_scaling_factor: Annotated[float | None, At("models.deepseekv2.topk_scaling_factor", HOT)]
    alltoall_ep_buffer_scale_factors: Annotated[
        tuple[tuple[int, float], ...], At("models.deepseekv2.alltoall_ep_buffer_scale_factors", HOT)
    ]
    kv_cache_bytes: Annotated[int, At("ModelConfig.cpuMemSize", DRAIN)]
    max_seq_len: Annotated[int | None, At("ModelDeployConfig.maxSeqLen", DRAIN)]
    max_input_token_len: Annotated[int | None, At("ModelDeployConfig.maxInputTokenLen", HOT)]
    truncation: Annotated[int, At("ModelDeployConfig.truncation", HOT)]
    block_size: Annotated[int, At("ScheduleConfig.cacheBlockSize", DRAIN)]
    max_prefill_tokens: Annotated[int, At("ScheduleConfig.maxPrefillTokens", HOT)]
    max_batch_size: Annotated[int, At("ScheduleConfig.maxBatchSize", HOT)]
    max_iter_times: Annotated[int | None, At("ScheduleConfig.maxIterTimes", HOT)]
    fleet_host: Annotated[str, At("ExpertMesh.fleetAddress", FLEET)]
    fleet_port: Annotated[int, At("ExpertMesh.fleetPort", FLEET)]
    data_address: Annotated[str, At("ExpertMesh.dataAddress", FLEET)]
    device: Annotated[str, At("ExpertMesh.device", FLEET)]
    device_id: Annotated[int | None, At("ExpertMesh.deviceId", FLEET)]
    dtype: Annotated[str, At("ExpertMesh.dtype", FLEET)]
    exchange: Annotated[str, At("ExpertMesh.exchange", FLEET)]
    same_host_transport: Annotated[str, At("ExpertMesh.sameHostTransport", FLEET)]
    micro_batches: Annotated[int, At("ExpertMesh.microBatches", HOT)]
    chunk_rows: Annotated[int, At("ExpertMesh.chunkRows", HOT)]
    redundant_experts: Annotated[int, At("ExpertMesh.redundantExperts", ROUTER)]
    expert_load_file: Annotated[str | None, At("ExpertMesh.expertLoadFile", ROUTER)]
    grouped_matmul: Annotated[str, At("ExpertMesh.groupedMatmul", HOT)]
    topology: Annotated[str, At("ExpertMesh.topology", ROUTER)]
    cutoff_min_rows: Annotated[int, At("ExpertMesh.cutoffMinRows", HOT)]
    experts_in_process: Annotated[bool, At("ExpertMesh.expertsInProcess", FLEET)]
    threads: Annotated[int | None, At("ExpertMesh.threads", FLEET)]
    register_timeout_s: Annotated[float, At("ExpertMesh.registerTimeoutSeconds", WORKERS)]
    deadline_floor_s: Annotated[float, At("ExpertMesh.deadlineFloorSeconds", HOT)]
    recovery_timeout_s: Annotated[float, At("ExpertMesh.recoveryTimeoutSeconds", HOT)]
    drain_timeout_s: Annotated[float, At("ExpertMesh.drainTimeoutSeconds", HOT)]
    trace_file: Annotated[str | None, At("ExpertMesh.traceFile", ROUTER)]
    log_level: Annotated[str, At("ExpertMesh.logLevel", HOT)]
    max_queued_requests: Annotated[int, At("ExpertMesh.maxQueuedRequests", HOT)]
    fleet_token_file: Annotated[str | None, At("ExpertMesh.fleetTokenFile", FLEET)]
    router: Annotated[str | None, At("ExpertMesh.router", WORKERS)]
    worker_id: Annotated[str | None, At("ExpertMesh.workerId", WORKERS)]
    agent_host: Annotated[str, At("ExpertMesh.agentAddress", WORKERS)]
    agent_port: Annotated[int, At("ExpertMesh.agentPort", WORKERS)]
    advertise_address: Annotated[str | None, At("ExpertMesh.advertiseAddress", WORKERS)]
    state_dir: Annotated[str | None, At("ExpertMesh.stateDir", ROUTER)]
    warnings: tuple[str, ...] = ()

    @property
    def cutoff_factor(self) -> float | None:
        """The bound on expanded rows at ep_level 1 as a share of all rows; None: no bound."""
        return (self.topk_scaling_factor or 1.0) if self.enable_init_routing_cutoff else None


MARKS = {
    name: mark
    for name, field in Config.model_fields.items()
    for mark in field.metadata
    if isinstance(mark, At)
}
"""The mark of each field that has one: all but `warnings`."""
KEYS = {name: mark.key for name, mark in MARKS.items()}
"""The key of each field that has one, like "ModelConfig.worldSize"."""


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the configuration once, at start.

    Raises:
        ConfigError: one sentence for each bad value, with the JSON path, the value found, and the rule.
    """
    return resolve(path, overrides).config


@dataclass(frozen=True, slots=True)
class Effective:
    """The configuration, and where each of its fields came from.

    Attributes:
        document: the file as it was given, without what the environment and the overrides put into it.
        file: where it stands; None: nowhere.
        paths: the JSON path of each field.
    """

    config: Config
    origins: dict[str, Origin]
    document: dict[str, Any]
    file: Path | None
    overrides: Mapping[str, Any]
    paths: dict[str, str]

    def replaced_by(self, document: dict[str, Any], source: str) -> Effective:
        """Resolve another document in the same place: same file, environment and overrides.

        Raises:
            ConfigError: one sentence for each bad value; `source` says where the document is from.
        """
        return _resolve(document, self.file, self.overrides, source)


def resolve(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Effective:
    """Read the configuration as `load_config` does, and remember where each value came from.

    Raises:
        ConfigError: one sentence for each bad value, with the JSON path, the value found, and the rule.
    """
    document = {} if path is None else read_document(path)
    return _resolve(document, path, overrides or {}, "" if path is None else shown_path(path))


def _resolve(
    given: dict[str, Any], path: Path | None, overrides: Mapping[str, Any], source: str
) -> Effective:
    document = copy.deepcopy(given)
    environment = {name: text for name, text in os.environ.items() if name != TOKEN_VARIABLE}
    variables, values, unknown = variables_of(environment)
    variables = {key: variable for key, variable in variables.items() if key not in overrides}
    try:
        for key, value in {**values, **overrides}.items():
            put(document, key, value)
        file, problems = validated(document, variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration cannot be read as JSON: {error}") from None
    sections = Sections.of(file)
    bad = frozenset[str]().union(*(problem.keys for problem in problems))
    problems += [problem for problem in problems_of(file, sections) if not problem.keys & bad]
    if problems:
        before = f"{source}: " if source else ""
        raise ConfigError(
            *(f"{before}{problem.sentence}" for problem in problems),
            paths=tuple(problem.path for problem in problems),
        )
    keys = keys_of(sections)
    derived, inferred = _derive(sections)
    derived["kv_cache_bytes"] = int(sections.value(keys["kv_cache_bytes"]) * GIGABYTE)
    taken = {name: sections.value(key) for name, key in keys.items()}
    config = Config(**{**taken, **derived}, warnings=(*warnings(file, sections), *unknown))
    origins = origins_of(keys, sections, variables, overrides, inferred)
    paths = {name: sections.path(key) for name, key in keys.items()}
    return Effective(config, origins, given, path, overrides, paths)


def keys_of(sections: Sections) -> dict[str, str]:
    """Return the key of each field: npuMemSize sizes the cache of an NPU, where it is given."""
    if sections.own.device == "npu" and sections.model.npu_mem_size > 0:
        return KEYS | {"kv_cache_bytes": "ModelConfig.npuMemSize"}
    return KEYS


def _derive(sections: Sections) -> tuple[dict[str, Any], dict[str, str]]:
    """Compute what is not taken as it stands in the file; say what each inferred field follows from."""
    model, own = sections.model, sections.own
    group = group_of(model)
    inferred = dict(group.inferred)
    values: dict[str, Any] = {
        "world_size": group.world_size,
        "moe_ep": group.moe_ep,
        "moe_tp": group.moe_tp,
    }
    if own.experts_in_process:
        values |= {"world_size": 0, "moe_ep": 0}
        inferred |= dict.fromkeys(("world_size", "moe_ep", "moe_tp"), "ExpertMesh.expertsInProcess true")
    elif group.world_size == 0:
        values["experts_in_process"] = True
        inferred["experts_in_process"] = "worldSize 0"
    if own.exchange == "auto":
        values["exchange"] = "links" if own.device == "cpu" else "collective"
        inferred["exchange"] = f"ExpertMesh.device {own.device}"
    for field, address in (("fleet_host", own.fleet_address), ("agent_host", own.agent_address)):
        if address is None:
            values[field] = own.data_address
            inferred[field] = "ExpertMesh.dataAddress"
    return values, inferred


def fleet_token(config: Config) -> str:
    """The secret that router and expert workers share.

    Raises:
        ConfigError: neither the environment nor a file holds one.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token and config.fleet_token_file is not None:
        try:
            token = Path(config.fleet_token_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"ExpertMesh.fleetTokenFile is {config.fleet_token_file!r} and cannot be read: {error}"
            ) from None
    if not token:
        raise ConfigError(
            "there is no fleet token, but router and expert workers must share one: "
            f"set {TOKEN_VARIABLE} or ExpertMesh.fleetTokenFile"
        )
    if not token.isascii() or not token.isprintable():
        raise ConfigError("the fleet token holds characters that are not printable ASCII: make a new one")
    return token
