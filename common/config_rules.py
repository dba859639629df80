"""Rules that several keys of the configuration must keep together, where they are present. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from common.config_file import ConfigFile, Sections
from common.config_problems import Problem
from common.mindie_model import ModelConfig
from common.not_built import refusals
from common.section import warnings_of

DEFAULT_WORLD_SIZE = 2
WILDCARDS = ("0.0.0.0", "::", "[::]")
LEAST_FACTOR_OF_MINDIE = 0.25
LEVEL_OF = {
    "models.deepseekv2.enable_init_routing_cutoff": 1,
    "models.deepseekv2.topk_scaling_factor": 1,
    "ExpertMesh.cutoffMinRows": 1,
    "models.deepseekv2.alltoall_ep_buffer_scale_factors": 2,
    "ExpertMesh.topology": 2,
}
"""The one ep_level at which a key acts."""


@dataclass(frozen=True, slots=True)
class Group:
    """How the routed experts are divided. `inferred` says what each field follows from that was absent."""

    world_size: int
    moe_ep: int
    moe_tp: int
    inferred: dict[str, str]


def group_of(model: ModelConfig) -> Group:
    """Complete worldSize, moe_ep and moe_tp: what is absent follows from the others."""
    moe_tp, moe_ep, world_size = model.moe_tp, model.moe_ep, model.world_size
    inferred = {}
    if world_size is None and moe_ep is not None:
        world_size = moe_ep * (moe_tp or 1)
        inferred["world_size"] = f"moe_ep {moe_ep} * moe_tp {moe_tp or 1}"
    elif world_size is None:
        world_size = DEFAULT_WORLD_SIZE * (moe_tp or 1)
    if moe_ep is None:
        moe_ep = world_size // (moe_tp or 1)
        inferred["moe_ep"] = f"worldSize {world_size} / moe_tp {moe_tp or 1}"
    if moe_tp is None:
        moe_tp = max(world_size // moe_ep, 1) if moe_ep else 1
        inferred["moe_tp"] = f"worldSize {world_size} / moe_ep {moe_ep}"
    return Group(world_size, moe_ep, moe_tp, inferred)


def problems_of(file: ConfigFile, sections: Sections) -> Iterator[Problem]:
    """Name everything that cannot stand together or is not built."""
    backend = file.backend_config
    twice = {
        "ModelDeployConfig": file.model_deploy_config is not None and backend.model_deploy_config is not None,
        "ScheduleConfig": file.schedule_config is not None and backend.schedule_config is not None,
    }
    for key, is_twice in twice.items():
        if is_twice:
            sentence = f"{key} stands at the top level and inside BackendConfig: keep one of them"
            yield Problem(frozenset({key}), key, sentence)
    yield from _group(sections)
    yield from _trust(sections)
    yield from refusals(sections)
    yield from _cutoff(sections)
    yield from _addresses(sections)
    yield from _lengths(sections)
    yield from _exchange(sections)


def warnings(file: ConfigFile, sections: Sections) -> Iterator[str]:
    """Name everything that has no effect, and what is likely a mistake."""
    yield from warnings_of(file)
    level = sections.deepseek.ep_level
    for key, acts_at in LEVEL_OF.items():
        asks_for_nothing = sections.value(key) in (None, False, "auto")
        if acts_at != level and sections.is_given(key) and not asks_for_nothing:
            yield f"{sections.path(key)} has no effect at ep_level {level}: it acts at ep_level {acts_at}"
    if sections.model.npu_mem_size != -1 and sections.own.device != "npu":
        yield f"{sections.path('ModelConfig.npuMemSize')} is ignored: it sizes the cache on an NPU"
    factor = sections.deepseek.topk_scaling_factor
    if factor is not None and factor < LEAST_FACTOR_OF_MINDIE:
        path = sections.path("models.deepseekv2.topk_scaling_factor")
        yield (
            f"{path} is {factor:g}: MindIE refuses less than {LEAST_FACTOR_OF_MINDIE}, and a small factor "
            "means many passes"
        )


def _group(sections: Sections) -> Iterator[Problem]:
    group, path = group_of(sections.model), sections.paths["ModelConfig"]
    product = group.moe_ep * group.moe_tp
    keys = frozenset({"worldSize", "moe_ep", "moe_tp"})
    if product != group.world_size:
        yield Problem(
            keys,
            f"{path}.worldSize",
            f"{path}.worldSize is {group.world_size}, but it must equal moe_ep * moe_tp, and "
            f"{group.moe_ep} * {group.moe_tp} is {product}: leave moe_ep and moe_tp out, or make them fit",
        )
    if group.moe_tp != 1 and (product == group.world_size or "moe_tp" not in group.inferred):
        yield Problem(
            keys,
            f"{path}.moe_tp",
            f"{path}.moe_tp is {group.moe_tp}, but an expert cannot be divided among workers in this "
            f"version: set moe_ep to worldSize ({group.world_size}) and leave moe_tp out",
        )


def _trust(sections: Sections) -> Iterator[Problem]:
    if sections.model.trust_remote_code:
        path = sections.path("ModelConfig.trustRemoteCode")
        yield Problem(
            frozenset({"trustRemoteCode"}),
            path,
            f"{path} is true, but nothing in a checkpoint is ever executed: set it to false",
        )


def _cutoff(sections: Sections) -> Iterator[Problem]:
    parameters = sections.deepseek
    if parameters.topk_scaling_factor is not None and not parameters.enable_init_routing_cutoff:
        path = sections.path("models.deepseekv2.topk_scaling_factor")
        yield Problem(
            frozenset({"topk_scaling_factor", "enable_init_routing_cutoff"}),
            path,
            f"{path} is {parameters.topk_scaling_factor:g}, but it acts only where "
            "enable_init_routing_cutoff is true: set that too, or leave both out",
        )


def _addresses(sections: Sections) -> Iterator[Problem]:
    server, own = sections.server, sections.own
    addresses = {
        "ServerConfig.ipAddress": server.ip_address,
        "ServerConfig.managementIpAddress": server.management_ip_address,
        "ExpertMesh.fleetAddress": own.fleet_address,
        "ExpertMesh.agentAddress": own.agent_address,
    }
    for path, address in addresses.items():
        if address in WILDCARDS and not server.allow_all_zero_ip_listening:
            yield Problem(
                frozenset({path.rpartition(".")[2], "allowAllZeroIpListening"}),
                path,
                f'{path} is "{address}", which is every interface of this host: name one address, '
                "or set ServerConfig.allowAllZeroIpListening to true",
            )
    if own.data_address in WILDCARDS:
        yield Problem(
            frozenset({"dataAddress"}),
            "ExpertMesh.dataAddress",
            f'ExpertMesh.dataAddress is "{own.data_address}", but the data plane has no authentication: '
            "name the address of the interface that reaches the other services",
        )


def _exchange(sections: Sections) -> Iterator[Problem]:
    own = sections.own
    if own.exchange == "links" and own.device != "cpu":
        path = sections.path("ExpertMesh.exchange")
        yield Problem(
            frozenset({"exchange", "device"}),
            path,
            f'{path} is "links", but rows of device "{own.device}" travel in a collective: leave it out',
        )


def _lengths(sections: Sections) -> Iterator[Problem]:
    longest = sections.deploy.max_seq_len
    if longest is None:
        return
    bounded = {
        "ModelDeployConfig.maxInputTokenLen": sections.deploy.max_input_token_len,
        "ScheduleConfig.maxIterTimes": sections.schedule.max_iter_times,
    }
    for key, value in bounded.items():
        if value is not None and value > longest:
            yield Problem(
                frozenset({"maxSeqLen", key.rpartition(".")[2]}),
                sections.path(key),
                f"{sections.path(key)} is {value}, but it must not be above maxSeqLen ({longest})",
            )
