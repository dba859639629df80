"""What the flags of `up` and `generate --model` mean: the one configuration file that all services get."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import load_config
from expertmesh.demo_model import demo_model
from expertmesh.fleet import FleetSettings

DEFAULT_TARGET = "127.0.0.1:1025"
DEFAULT_ADMIN = "127.0.0.1:1026"
MODEL_FAMILIES = ("deepseekv2", "deepseek_v2", "deepseekv3", "deepseek_v3")


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """The flags as given; None is a flag that was not given."""

    model: Path | None = None
    config: Path | None = None
    expert_workers: int | None = None
    ep_level: int | None = None
    redundant_experts: int | None = None
    device: str | None = None
    dtype: str | None = None
    port: int | None = None
    admin_port: int | None = None
    http_port: int | None = None

    def settings(self) -> FleetSettings:
        """The configuration file with the flags of MindIE's sections in it, and those of our own beside it.

        Raises:
            ConfigError: a file that cannot be read or that the services would refuse.
        """
        # The file is checked before anything is merged into it, so that an error names it.
        load_config(self.config)
        settings = json.loads(self.config.read_bytes()) if self.config else {}
        backend = settings.get("BackendConfig", {})
        place = backend if "ModelDeployConfig" in backend else settings
        model = place.setdefault("ModelDeployConfig", {}).setdefault("ModelConfig", [{}])[0]
        self._apply_model(model)
        self._apply_ports(settings.setdefault("ServerConfig", {}))
        overrides = {
            "ModelConfig.worldSize": self.expert_workers or None,
            "ExpertMesh.device": self.device,
            "ExpertMesh.dtype": self.dtype,
            "ExpertMesh.redundantExperts": self.redundant_experts,
            "ExpertMesh.expertsInProcess": None if self.expert_workers is None else self.expert_workers == 0,
            "ExpertMesh.fleetPort": 0 if self.port == 0 else None,
            "ExpertMesh.httpPort": self.http_port,
        }
        return FleetSettings(settings, {key: value for key, value in overrides.items() if value is not None})

    def _apply_model(self, model: dict[str, Any]) -> None:
        directory = self.model
        if directory is None and model.get("modelWeightPath") is None:
            directory = demo_model()
        if directory is not None:
            model["modelWeightPath"] = str(directory.resolve())
            model.setdefault("modelName", model_name_of(directory))
        if self.expert_workers is not None:
            for key in ("worldSize", "moe_ep", "moe_tp"):
                model.pop(key, None)
        if self.ep_level is not None:
            _family(model)["ep_level"] = self.ep_level

    def _apply_ports(self, server: dict[str, Any]) -> None:
        if self.port == 0:
            server["managementPort"] = 0
        if self.port is not None:
            server["port"] = self.port
        if self.admin_port is not None:
            server["managementPort"] = self.admin_port


def model_name_of(directory: Path) -> str:
    """The directory's name with the characters a model name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", directory.resolve().name).strip("-_.") or "deepseek"


def _family(model: dict[str, Any]) -> dict[str, Any]:
    """The section of the model's family, where ep_level stands; made where it is missing."""
    models = model.get("models", {})
    model["models"] = json.loads(models) if isinstance(models, str) else models
    name = next((one for one in MODEL_FAMILIES if one in model["models"]), MODEL_FAMILIES[0])
    section: dict[str, Any] = model["models"].setdefault(name, {})
    return section
