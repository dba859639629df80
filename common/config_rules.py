"""Rules that several keys of the configuration must keep together, and what is refused by name. Pure."""

from __future__ import annotations

from common.errors import ConfigError
from common.expertmesh_section import ExpertMeshSection
from common.mindie import BackendConfig, ModelConfig, ModelDeployConfig, ServerConfig

DEFAULT_WORLD_SIZE = 2
WILDCARDS = ("0.0.0.0", "::", "[::]", "")


def group_of(model: ModelConfig, path: str) -> tuple[int, int, int]:
    """Complete (worldSize, moe_ep, moe_tp): what is absent is inferred from the others."""
    moe_tp, moe_ep, world_size = model.moe_tp, model.moe_ep, model.world_size
    if world_size is None:
        world_size = DEFAULT_WORLD_SIZE * (moe_tp or 1) if moe_ep is None else moe_ep * (moe_tp or 1)
    if moe_ep is None:
        moe_ep = world_size // (moe_tp or 1)
    if moe_tp is None:
        moe_tp = max(world_size // moe_ep, 1) if moe_ep else 1
    if moe_ep * moe_tp != world_size:
        raise ConfigError(
            f"{path}.worldSize is {world_size}, but it must equal moe_ep * moe_tp, and {moe_ep} * {moe_tp} "
            f"is {moe_ep * moe_tp}: leave moe_ep and moe_tp out, or make them fit"
        )
    if moe_tp != 1:
        raise ConfigError(
            f"{path}.moe_tp is {moe_tp}, but an expert cannot be divided among workers in this version: "
            f"set moe_ep to worldSize ({world_size}) and leave moe_tp out"
        )
    return world_size, moe_ep, moe_tp


def refuse_what_is_not_built(
    server: ServerConfig, backend: BackendConfig, model: ModelConfig, path: str, own: ExpertMeshSection
) -> None:
    """Refuse what would silently be less safe, or other, than what was asked for."""
    parameters = model.models.deepseekv2
    no_tls = "but TLS is not built in this version and nothing is sent in plaintext silently: set it to false"
    refusals: list[tuple[bool, str]] = [
        (server.https_enabled, f"ServerConfig.httpsEnabled is true, {no_tls}"),
        (server.inter_comm_tls_enabled, f"ServerConfig.interCommTLSEnabled is true, {no_tls}"),
        (backend.inter_node_tls_enabled, f"BackendConfig.interNodeTLSEnabled is true, {no_tls}"),
        (
            model.trust_remote_code,
            f"{path}.trustRemoteCode is true, but nothing in a checkpoint is ever executed: set it to false",
        ),
        (
            parameters.topk_scaling_factor is not None and not parameters.enable_init_routing_cutoff,
            f"{path}.models.deepseekv2.topk_scaling_factor is {parameters.topk_scaling_factor}, but it acts "
            "only where enable_init_routing_cutoff is true: set that too, or leave both out",
        ),
        (
            own.http_port is not None,
            f"ExpertMesh.httpPort is {own.http_port}, but HTTP is not built in this version: leave it out",
        ),
        (
            own.device != "cpu",
            f"ExpertMesh.device is {own.device!r}, but only 'cpu' is built in this version",
        ),
        (
            own.redundant_experts != 0,
            f"ExpertMesh.redundantExperts is {own.redundant_experts}, but only 0 is built in this version",
        ),
    ]
    for is_refused, sentence in refusals:
        if is_refused:
            raise ConfigError(sentence)


def check_addresses(server: ServerConfig, own: ExpertMeshSection) -> None:
    """Refuse to listen on every interface unless that was asked for."""
    addresses = {
        "ServerConfig.ipAddress": server.ip_address,
        "ServerConfig.managementIpAddress": server.management_ip_address,
        "ExpertMesh.fleetAddress": own.fleet_address,
        "ExpertMesh.agentAddress": own.agent_address,
    }
    for path, address in addresses.items():
        if address in WILDCARDS and not server.allow_all_zero_ip_listening:
            raise ConfigError(
                f"{path} is {address!r}, which is every interface of this host: name one address, "
                "or set ServerConfig.allowAllZeroIpListening to true"
            )
    if own.data_address in WILDCARDS:
        raise ConfigError(
            f"ExpertMesh.dataAddress is {own.data_address!r}, but the data plane has no authentication: "
            "name the address of the interface that reaches the other services"
        )


def check_lengths(deploy: ModelDeployConfig, path: str) -> None:
    """Check the lengths against each other."""
    longest, prompt = deploy.max_seq_len, deploy.max_input_token_len
    if longest is not None and longest < 2:
        raise ConfigError(f"{path}.maxSeqLen is {longest}, but a prompt and an answer need at least 2 tokens")
    if longest is not None and prompt is not None and prompt > longest:
        raise ConfigError(
            f"{path}.maxInputTokenLen is {prompt}, but it must not be above maxSeqLen ({longest})"
        )
