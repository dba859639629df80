"""Configuration files for tests: those of the feature's documentation, MindIE's own, and changes of them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from common.config import Config, load_config

FOLDER = Path(__file__).resolve().parent

BUFFER_FACTORS = (
    *((1048576, 1.32), (524288, 1.4), (262144, 1.53), (131072, 1.8)),
    *((32768, 3.0), (8192, 5.2), (0, 8.0)),
)

# The two examples in the documentation of MindIE's expert parallelism, as they are printed there, in braces.
LEVEL_2: dict[str, Any] = json.loads((FOLDER / "ep_level_2.json").read_text())
LEVEL_1: dict[str, Any] = json.loads((FOLDER / "ep_level_1.json").read_text())

SERVER = {
    "ipAddress": "127.0.0.1",
    "managementIpAddress": "127.0.0.2",
    "port": 1025,
    "managementPort": 1026,
    "metricsPort": 1027,
    "allowAllZeroIpListening": False,
    "maxLinkNum": 1000,
    "httpsEnabled": False,
    "fullTextEnabled": False,
    "tlsCaPath": "security/ca/",
    "tlsCaFile": ["ca.pem"],
    "tlsCert": "security/certs/server.pem",
    "tlsPk": "security/keys/server.key.pem",
    "tlsPkPwd": "security/pass/key_pwd.txt",
    "tlsCrlPath": "security/certs/",
    "tlsCrlFiles": ["server_crl.pem"],
    "managementTlsCaFile": ["management_ca.pem"],
    "inferMode": "standard",
    "interCommTLSEnabled": False,
    "interCommPort": 1121,
    "openAiSupport": "vllm",
    "tokenTimeout": 600,
    "e2eTimeout": 600,
    "distDPServerEnabled": False,
}
BACKEND = {
    "backendName": "mindieservice_llm_engine",
    "modelInstanceNumber": 1,
    "npuDeviceIds": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "tokenizerProcessNumber": 8,
    "multiNodesInferEnabled": False,
    "multiNodesInferPort": 1120,
    "interNodeTLSEnabled": False,
}
SCHEDULE = {
    "templateType": "Standard",
    "templateName": "Standard_LLM",
    "cacheBlockSize": 128,
    "maxPrefillBatchSize": 50,
    "maxPrefillTokens": 8192,
    "prefillTimeMsPerReq": 150,
    "prefillPolicyType": 0,
    "decodeTimeMsPerReq": 50,
    "decodePolicyType": 0,
    "maxBatchSize": 200,
    "maxIterTimes": 512,
    "maxPreemptCount": 0,
    "supportSelectBatch": False,
    "maxQueueDelayMicroseconds": 5000,
    "maxFirstTokenWaitTime": 2500,
}


def completed(example: dict[str, Any]) -> dict[str, Any]:
    """The example with the sections that MindIE's own file has around it."""
    return {
        "Version": "1.0.0",
        "ServerConfig": SERVER,
        "BackendConfig": {**BACKEND, **example, "ScheduleConfig": SCHEDULE},
        "LogConfig": {
            "dynamicLogLevel": "",
            "dynamicLogLevelValidHours": 2,
            "dynamicLogLevelValidTime": "",
        },
    }


def changed(path: str, value: Any, example: dict[str, Any] = LEVEL_2) -> dict[str, Any]:
    """A copy with one value changed. MODEL is ModelDeployConfig.ModelConfig[0], EP its models.deepseekv2."""
    document: dict[str, Any] = copy.deepcopy(example)
    here: Any = document
    path = re.sub(r"^EP\b", "MODEL.models.deepseekv2", path)
    path = re.sub(r"^MODEL\b", "ModelDeployConfig.ModelConfig.0", path)
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys:
        here = here[key] if isinstance(key, int) else here.setdefault(key, {})
    here[last] = value
    return document


def write(folder: Path, document: Any) -> Path:
    """Write a configuration file."""
    file = folder / "config.json"
    file.write_text(json.dumps(document))
    return file


def load(folder: Path, document: Any, **overrides: Any) -> Config:
    """Write a configuration file and load it."""
    return load_config(write(folder, document), overrides)
