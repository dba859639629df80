"""What the operator chose: a JSON file in MindIE's layout plus section `ExpertMesh`, as one frozen `Config`.

`load_config(path, overrides)`: defaults < file < EXPERTMESH_... of the environment < overrides. These map
JSON paths to values: {"ServerConfig.port": 0, "ModelConfig.worldSize": 4, "ExpertMesh.fleetPort": 0}.

| field of Config         | from                                     | default                              |
|-------------------------|------------------------------------------|--------------------------------------|
| host, port              | ServerConfig.ipAddress, .port            | 127.0.0.1, 1025 (0: any free port)   |
| management_host, _port  | ServerConfig.managementIpAddress, ...Port| 127.0.0.1, 1026                      |
| model_name              | ModelConfig.modelName                    | "deepseek"                           |
| model_path              | ModelConfig.modelWeightPath              | None: not said                       |
| world_size              | ModelConfig.worldSize                    | moe_ep * moe_tp, or 2                |
| moe_ep, moe_tp          | ModelConfig.moe_ep, .moe_tp              | world_size / the other; moe_tp is 1  |
| ep_level                | models.deepseekv2.ep_level               | 1                                    |
| kv_cache_bytes          | ModelConfig.cpuMemSize (GB)              | 1 GB                                 |
| max_seq_len             | ModelDeployConfig.maxSeqLen              | None: what the checkpoint allows     |
| max_input_token_len     | ModelDeployConfig.maxInputTokenLen       | None: max_seq_len - 1                |
| truncation              | ModelDeployConfig.truncation             | 0 refuse; -1 cut right; 1 cut left   |
| block_size              | ScheduleConfig.cacheBlockSize            | 128                                  |
| max_prefill_tokens      | ScheduleConfig.maxPrefillTokens          | 8192                                 |
| max_batch_size          | ScheduleConfig.maxBatchSize              | 200                                  |
| max_iter_times          | ScheduleConfig.maxIterTimes              | None: no bound on generated tokens   |
| fleet_host, fleet_port  | ExpertMesh.fleetAddress, .fleetPort      | data_address, 1028                   |
| data_address            | ExpertMesh.dataAddress                   | 127.0.0.1                            |
| device, dtype           | ExpertMesh.device, .dtype                | "cpu", "auto"                        |
| micro_batches           | ExpertMesh.microBatches                  | 1: a step is not cut                 |
| experts_in_process      | worldSize 0 or ExpertMesh.expertsInProcess| False; True: no expert workers       |
| threads                 | ExpertMesh.threads                       | None: torch's default                |
| register_timeout_s      | ExpertMesh.registerTimeoutSeconds        | 60.0                                 |
| deadline_floor_s        | ExpertMesh.deadlineFloorSeconds          | 0.25                                 |
| drain_timeout_s         | ExpertMesh.drainTimeoutSeconds           | 30.0                                 |
| log_level               | ExpertMesh.logLevel                      | "info"                               |
| max_queued_requests     | ExpertMesh.maxQueuedRequests             | 1000                                 |
| fleet_token_file        | ExpertMesh.fleetTokenFile                | None; read with fleet_token(config)  |
| router                  | ExpertMesh.router (workers: HOST:PORT)   | None: not said                       |
| worker_id               | ExpertMesh.workerId                      | None: the worker makes one           |
| agent_host, agent_port  | ExpertMesh.agentAddress, .agentPort      | data_address, 0                      |
| advertise_address       | ExpertMesh.advertiseAddress (HOST[:PORT])| None: where the agent listens        |
| warnings                | what is in the file and does not act     | ()                                   |
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_snake

from common.config_rules import check_addresses, check_lengths, group_of, refuse_what_is_not_built
from common.errors import ConfigError
from common.expertmesh_section import ExpertMeshSection
from common.mindie import (
    BackendConfig,
    ModelDeployConfig,
    ScheduleConfig,
    Section,
    ServerConfig,
    warnings_of,
)

MAX_FILE_BYTES = 10 << 20
TOKEN_VARIABLE = "EXPERTMESH_FLEET_TOKEN"
# Kubernetes and docker links put addresses of services into every container under names like these.
SERVICE_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP).*)?$")

SectionT = TypeVar("SectionT", bound=BaseModel)


class Config(BaseModel):
    """Everything the operator chose; the table at the top of this file names each field's origin."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    host: str
    port: int
    management_host: str
    management_port: int
    model_name: str
    model_path: str | None
    world_size: int
    moe_ep: int
    moe_tp: int
    ep_level: int
    kv_cache_bytes: int
    max_seq_len: int | None
    max_input_token_len: int | None
    truncation: int
    block_size: int
    max_prefill_tokens: int
    max_batch_size: int
    max_iter_times: int | None
    fleet_host: str
    fleet_port: int
    data_address: str
    device: str
    dtype: str
    micro_batches: int
    experts_in_process: bool
    threads: int | None
    register_timeout_s: float
    deadline_floor_s: float
    drain_timeout_s: float
    log_level: str
    max_queued_requests: int
    fleet_token_file: str | None
    router: str | None
    worker_id: str | None
    agent_host: str
    agent_port: int
    advertise_address: str | None
    warnings: tuple[str, ...] = ()


class _File(Section):
    """The whole file."""

    version: Any = None
    server_config: ServerConfig = ServerConfig()
    backend_config: BackendConfig = BackendConfig()
    model_deploy_config: ModelDeployConfig | None = None
    schedule_config: ScheduleConfig | None = None
    log_config: Any = None
    expert_mesh: ExpertMeshSection = ExpertMeshSection()

    model_config = ConfigDict(alias_generator=lambda name: "".join(part.title() for part in name.split("_")))


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the configuration once, at start.

    Raises:
        ConfigError: one sentence with the JSON path, the value found, and the rule.
    """
    document = {} if path is None else _read(path)
    environment, unknown = _environment(os.environ)
    try:
        for where, value in {**environment, **(overrides or {})}.items():
            _put(document, where, value)
        text = json.dumps(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the configuration cannot be read as JSON: {error}") from None
    source = "" if path is None else f"{path}: "
    try:
        file = _File.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(source + _sentence(error)) from None
    try:
        return _flatten(file, unknown)
    except ConfigError as error:
        raise ConfigError(f"{source}{error}") from None


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


def check_experts(config: Config, n_routed_experts: int) -> None:
    """Check the configured group against the checkpoint.

    Raises:
        ConfigError: the routed experts cannot be dealt out evenly to moe_ep workers.
    """
    if not config.experts_in_process and n_routed_experts % config.moe_ep != 0:
        raise ConfigError(
            f"moe_ep is {config.moe_ep}, but it must divide the checkpoint's n_routed_experts "
            f"({n_routed_experts}): choose another worldSize or moe_ep"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes: it is no configuration file")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {type(document).__name__}, but a configuration is a JSON object")
    return document


def _environment(variables: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Take EXPERTMESH_... variables as overrides; say which are unknown."""
    aliases = {
        to_snake(field.alias or name).upper(): (field.alias or name, field.annotation)
        for name, field in ExpertMeshSection.model_fields.items()
    }
    found: dict[str, Any] = {}
    unknown = []
    for name, text in variables.items():
        if not name.startswith("EXPERTMESH_") or name == TOKEN_VARIABLE or text == "":
            continue
        alias, annotation = aliases.get(name.removeprefix("EXPERTMESH_"), (None, None))
        if alias is None:
            if not SERVICE_VARIABLE.search(name):
                unknown.append(f"{name} is ignored: expertmesh does not know this variable")
        else:
            found[f"ExpertMesh.{alias}"] = text if "str" in str(annotation) else _plain(text)
    return found, unknown


def _plain(text: str) -> Any:
    """A number or a boolean where the text is one, else the text."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _put(document: dict[str, Any], where: str, value: Any) -> None:
    """Set one value by its JSON path, with ModelDeployConfig and ScheduleConfig where the file has them."""
    keys = where.split(".")
    backend = document.get("BackendConfig")
    if keys[0] == "ModelConfig":
        keys = ["ModelDeployConfig", *keys]
    if (
        keys[0] in ("ModelDeployConfig", "ScheduleConfig")
        and isinstance(backend, dict)
        and keys[0] in backend
    ):
        document = backend
    here: Any = document
    for key in keys[:-1]:
        here = here.setdefault(key, [{}] if key == "ModelConfig" else {}) if isinstance(here, dict) else None
        if key == "ModelConfig" and isinstance(here, list) and here:
            here = here[0]
    if isinstance(here, dict):
        here[keys[-1]] = value


def _sentence(error: ValidationError) -> str:
    """Say the first problem as one sentence: JSON path, value, rule."""
    first = error.errors(include_url=False)[0]
    path = ""
    for key in first["loc"]:
        part = repr(key) if isinstance(key, str) and not key.isprintable() else key
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    others = error.error_count() - 1
    more = f" ({others} more to correct)" if others else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(str(field.alias) for field in ExpertMeshSection.model_fields.values()))
        return f"{path} is not a key of its section; known are {known}{more}"
    value = repr(first["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    rule = first["msg"].removeprefix("Value error, ")
    rule = re.sub(r"^(Input|Value|String|Tuple|List|Field) ", "", rule).rstrip(".")
    return f"{path or 'the file'} is {value}: it {rule}{more}"


def _one_place(key: str, outer: SectionT | None, inner: SectionT | None) -> tuple[SectionT | None, str]:
    if outer is not None and inner is not None:
        raise ConfigError(f"{key} stands at the top level and inside BackendConfig: keep one of them")
    return (outer, key) if outer is not None else (inner, f"BackendConfig.{key}")


def _flatten(file: _File, warnings: list[str]) -> Config:
    deploy, deploy_path = _one_place(
        "ModelDeployConfig", file.model_deploy_config, file.backend_config.model_deploy_config
    )
    schedule, _ = _one_place("ScheduleConfig", file.schedule_config, file.backend_config.schedule_config)
    deploy, schedule = deploy or ModelDeployConfig(), schedule or ScheduleConfig()
    model, model_path = deploy.model_configs[0], f"{deploy_path}.ModelConfig[0]"
    server, own = file.server_config, file.expert_mesh
    world_size, moe_ep, moe_tp = group_of(model, model_path)
    in_process = own.experts_in_process or model.world_size == 0
    if in_process:
        world_size, moe_ep = 0, 0
    refuse_what_is_not_built(server, file.backend_config, model, model_path, own)
    check_addresses(server, own)
    check_lengths(deploy, deploy_path)
    return Config(
        host=server.ip_address or "127.0.0.1",
        port=1025 if server.port is None else server.port,
        management_host=server.management_ip_address or "127.0.0.1",
        management_port=1026 if server.management_port is None else server.management_port,
        model_name=model.model_name,
        model_path=model.model_weight_path,
        world_size=world_size,
        moe_ep=moe_ep,
        moe_tp=moe_tp,
        ep_level=model.models.deepseekv2.ep_level,
        kv_cache_bytes=int((model.cpu_mem_size or 1) * (1 << 30)),
        max_seq_len=deploy.max_seq_len,
        max_input_token_len=deploy.max_input_token_len,
        truncation=deploy.truncation,
        block_size=schedule.cache_block_size or 128,
        max_prefill_tokens=schedule.max_prefill_tokens or 8192,
        max_batch_size=schedule.max_batch_size or 200,
        max_iter_times=schedule.max_iter_times,
        fleet_host=own.fleet_address or own.data_address,
        fleet_port=own.fleet_port,
        data_address=own.data_address,
        device=own.device,
        dtype=own.dtype,
        micro_batches=own.micro_batches,
        experts_in_process=in_process,
        threads=own.threads,
        register_timeout_s=own.register_timeout_seconds,
        deadline_floor_s=own.deadline_floor_seconds,
        drain_timeout_s=own.drain_timeout_seconds,
        log_level=own.log_level,
        max_queued_requests=own.max_queued_requests,
        fleet_token_file=own.fleet_token_file,
        router=own.router,
        worker_id=own.worker_id,
        agent_host=own.agent_address or own.data_address,
        agent_port=own.agent_port,
        advertise_address=own.advertise_address,
        warnings=(*warnings_of(file), *warnings),
    )
