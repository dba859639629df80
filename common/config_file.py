"""The configuration file: read as a document, changed by key, and its sections wherever they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from pydantic.alias_generators import to_snake

from common.deepseek_section import DeepseekV2
from common.errors import ConfigError
from common.expertmesh_section import ExpertMeshSection
from common.json_file import read_json, shown, shown_path
from common.mindie import BackendConfig, LogConfig, ScheduleConfig, ServerConfig
from common.mindie_model import ModelConfig, ModelDeployConfig
from common.section import Ignored, Section, key_of

# Kubernetes and docker links put addresses of services into every container under names like these.
SERVICE_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP).*)?$")
VARIABLES = {
    **{
        f"EXPERTMESH_{to_snake(key_of(ExpertMeshSection, name)).upper()}": (
            f"ExpertMesh.{key_of(ExpertMeshSection, name)}"
        )
        for name in ExpertMeshSection.model_fields
    },
    "EXPERTMESH_WORLD_SIZE": "ModelConfig.worldSize",
    "EXPERTMESH_IP_ADDRESS": "ServerConfig.ipAddress",
    "EXPERTMESH_MANAGEMENT_IP_ADDRESS": "ServerConfig.managementIpAddress",
}
"""The key that each variable sets: all of our own, and MindIE's where containers of one file differ."""
TEXTS = {
    *(
        f"ExpertMesh.{key_of(ExpertMeshSection, name)}"
        for name, field in ExpertMeshSection.model_fields.items()
        if "str" in str(field.annotation)
    ),
    "ServerConfig.ipAddress",
    "ServerConfig.managementIpAddress",
}
"""Keys whose values are text, even text that looks like a number."""


class ConfigFile(Section):
    """The whole file."""

    version: Annotated[str, Ignored()] = Field(default="1.0.0", alias="Version")
    server_config: ServerConfig = Field(default=ServerConfig(), alias="ServerConfig")
    backend_config: BackendConfig = Field(default=BackendConfig(), alias="BackendConfig")
    model_deploy_config: ModelDeployConfig | None = Field(default=None, alias="ModelDeployConfig")
    schedule_config: ScheduleConfig | None = Field(default=None, alias="ScheduleConfig")
    log_config: LogConfig = Field(default=LogConfig(), alias="LogConfig")
    enable_dynamic_adjust_timeout_config: Annotated[bool, Ignored()] = Field(
        default=False, alias="EnableDynamicAdjustTimeoutConfig"
    )
    expert_mesh: ExpertMeshSection = Field(default=ExpertMeshSection(), alias="ExpertMesh")


@dataclass(frozen=True, slots=True)
class Sections:
    """The sections that act, by the names with which keys are addressed: "ModelConfig.worldSize".

    Attributes:
        paths: where each section stands in the file.
    """

    server: ServerConfig
    backend: BackendConfig
    deploy: ModelDeployConfig
    schedule: ScheduleConfig
    own: ExpertMeshSection
    paths: Mapping[str, str]

    @classmethod
    def of(cls, file: ConfigFile) -> Sections:
        """Find the sections that may stand at the top level or inside BackendConfig."""
        backend = file.backend_config
        deploy_in = (
            "BackendConfig." if file.model_deploy_config is None and backend.model_deploy_config else ""
        )
        schedule_in = "BackendConfig." if file.schedule_config is None and backend.schedule_config else ""
        model_path = f"{deploy_in}ModelDeployConfig.ModelConfig[0]"
        return cls(
            server=file.server_config,
            backend=backend,
            deploy=file.model_deploy_config or backend.model_deploy_config or ModelDeployConfig(),
            schedule=file.schedule_config or backend.schedule_config or ScheduleConfig(),
            own=file.expert_mesh,
            paths={
                "ModelDeployConfig": f"{deploy_in}ModelDeployConfig",
                "ModelConfig": model_path,
                "models.deepseekv2": f"{model_path}.models.deepseekv2",
                "ScheduleConfig": f"{schedule_in}ScheduleConfig",
            },
        )

    @property
    def model(self) -> ModelConfig:
        """The one model that is served."""
        return self.deploy.model_configs[0]

    @property
    def deepseek(self) -> DeepseekV2:
        """The parameters of expert parallelism."""
        return self.model.models.deepseekv2

    def __getitem__(self, section: str) -> BaseModel:
        return {
            "ServerConfig": self.server,
            "BackendConfig": self.backend,
            "ModelDeployConfig": self.deploy,
            "ModelConfig": self.model,
            "models.deepseekv2": self.deepseek,
            "ScheduleConfig": self.schedule,
            "ExpertMesh": self.own,
        }[section]

    def value(self, key: str) -> Any:
        """The value at a key like "ModelConfig.worldSize", given or by default."""
        section, name = self._field(key)
        return getattr(section, name)

    def default(self, key: str) -> Any:
        """The value the key has where it is absent."""
        section, name = self._field(key)
        return type(section).model_fields[name].default

    def is_given(self, key: str) -> bool:
        """Whether the file, the environment or an override has the key."""
        section, name = self._field(key)
        return name in section.model_fields_set

    def path(self, key: str) -> str:
        """The JSON path of a key like "ModelConfig.worldSize"."""
        section, _, name = key.rpartition(".")
        return f"{self.paths.get(section, section)}.{name}"

    def _field(self, key: str) -> tuple[BaseModel, str]:
        section_name, _, alias = key.rpartition(".")
        section = self[section_name]
        names = (name for name in type(section).model_fields if key_of(type(section), name) == alias)
        return section, next(names)


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is not there, too large, not JSON, no object, or has a key twice.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{shown_path(path)} holds {shown(document)}, but a configuration is a JSON object")
    return document


def variables_of(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Take EXPERTMESH_... variables.

    Returns:
        The variable of each key, the value of each key, and a warning for each variable nobody knows.
    """
    variables: dict[str, str] = {}
    values: dict[str, Any] = {}
    unknown = []
    for variable, text in environment.items():
        if not variable.startswith("EXPERTMESH_") or text == "":
            continue
        key = VARIABLES.get(variable)
        if key is not None:
            variables[key] = variable
            values[key] = text if key in TEXTS else _plain(text)
        elif not SERVICE_VARIABLE.search(variable):
            unknown.append(f"{variable} is ignored: expertmesh does not know this variable")
    return variables, values, unknown


def _plain(text: str) -> Any:
    """A number or a boolean where the text is one, else the text."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set one value, with ModelDeployConfig and ScheduleConfig where the file has them."""
    keys = key.split(".")
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
    for one in keys[:-1]:
        here = here.setdefault(one, [{}] if one == "ModelConfig" else {}) if isinstance(here, dict) else None
        if one == "ModelConfig" and isinstance(here, list) and here:
            here = here[0]
    if isinstance(here, dict):
        here[keys[-1]] = value
