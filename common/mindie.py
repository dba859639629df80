"""The sections of MindIE's config.json about services, back end, scheduling and logs.

Where a key acts here, its default is ours; where it is ignored, its default is MindIE's. The section about
the model is in common/mindie_model.py, the keys for certificates are in common/mindie_tls.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.mindie_model import ModelDeployConfig
from common.mindie_tls import BackendTls, ServerTls
from common.section import (
    Address,
    Ignored,
    IgnoredBool,
    IgnoredCount,
    IgnoredObject,
    IgnoredPort,
    IgnoredText,
    IgnoredTexts,
    Port,
    Section,
    matching,
)

DEADLINE = Ignored("a client's deadline ends its request")
ONE_MACHINE = Ignored("expert workers register with the router, wherever they run")
NO_PREFIX_CACHE = Ignored("prefixes are not cached in this version")
CHUNKS = Ignored("prompts are always computed in chunks of at most maxPrefillTokens")


class HealthCheckConfig(Section):
    """`HealthCheckConfig` of the server."""

    npu_usage_threshold: Annotated[int, Ignored("grpc.health.v1 says whether the router serves")] = Field(
        default=10, ge=0, le=100
    )


class ServerConfig(ServerTls):
    """Where the router listens."""

    ip_address: Address = "127.0.0.1"
    management_ip_address: Address = "127.0.0.1"
    port: Port = 1025
    management_port: Port = 1026
    metrics_port: Annotated[int, Ignored("no metrics are served in this version")] = Field(
        default=1027, ge=1024, le=65535
    )
    allow_all_zero_ip_listening: bool = False
    https_enabled: bool = False
    inter_comm_tls_enabled: bool = Field(default=False, alias="interCommTLSEnabled")
    inter_comm_port: IgnoredPort = 1121
    max_link_num: Annotated[int, Ignored("ExpertMesh.maxQueuedRequests bounds what waits")] = Field(
        default=1000, ge=1, le=4096
    )
    token_timeout: Annotated[int, DEADLINE] = Field(default=600, ge=1, le=3600)
    e2e_timeout: Annotated[int, DEADLINE] = Field(default=600, alias="e2eTimeout", ge=1, le=65535)
    infer_mode: Annotated[Literal["standard", "dmi"], Ignored("one router computes prompts and answers")] = (
        "standard"
    )
    open_ai_support: Annotated[str, Ignored("HTTP is not built in this version")] = "vllm"
    full_text_enabled: Annotated[bool, Ignored("a chunk holds its own text only")] = False
    dist_dp_server_enabled: Annotated[bool, ONE_MACHINE] = Field(default=False, alias="distDPServerEnabled")
    max_request_length: Annotated[int, Ignored("ModelDeployConfig.maxInputTokenLen bounds a prompt")] = Field(
        default=40, ge=1, le=100
    )
    max_json_depth: IgnoredCount = None
    health_check_config: HealthCheckConfig = Field(default=HealthCheckConfig(), alias="HealthCheckConfig")
    layerwise_disaggregated: IgnoredBool = False
    layerwise_disaggregated_role_type: IgnoredText = None
    layerwise_disaggregated_master_ip_address: IgnoredText = None
    layerwise_disaggregated_slave_ip_address: IgnoredTexts = None
    layerwise_disaggregated_data_port: IgnoredPort = None
    layerwise_disaggregated_crtl_port: Annotated[tuple[int, ...] | None, Ignored()] = None


class ScheduleConfig(Section):
    """`ScheduleConfig`: what one step may hold."""

    cache_block_size: int = Field(default=128, ge=1, le=128)
    max_prefill_tokens: int = Field(default=8192, ge=1, le=4194304)
    max_batch_size: int = Field(default=200, ge=1, le=819200)
    max_iter_times: int | None = Field(default=None, ge=1)
    template_type: Annotated[Literal["Standard", "Mix"], CHUNKS] = "Standard"
    template_name: IgnoredText = "Standard_LLM"
    max_prefill_batch_size: Annotated[int, Ignored("maxPrefillTokens and maxBatchSize bound a step")] = Field(
        default=50, ge=0, le=819200
    )
    prefill_time_ms_per_req: Annotated[int, Ignored()] = Field(default=150, ge=0, le=1000)
    decode_time_ms_per_req: Annotated[int, Ignored()] = Field(default=50, ge=0, le=1000)
    prefill_policy_type: Annotated[Literal[0], Ignored()] = 0
    decode_policy_type: Annotated[Literal[0], Ignored()] = 0
    policy_type: Annotated[Literal[0, 4, 5, 6, 7], Ignored("the first to come is served first")] = 0
    max_preempt_count: Annotated[int, Ignored("the scheduler preempts when the KV cache is full")] = Field(
        default=0, ge=0, le=819200
    )
    support_select_batch: IgnoredBool = False
    stage_select_policy: Annotated[int, Ignored()] = Field(default=0, ge=0, le=2)
    max_queue_delay_microseconds: Annotated[int, Ignored("a step never waits for more requests")] = Field(
        default=5000, ge=500, le=1000000
    )
    max_first_token_wait_time: Annotated[int, Ignored()] = Field(default=2500, ge=0, le=3600000)
    max_n: Annotated[int, Ignored("n above 1 is not built in this version")] = Field(
        default=128, ge=1, le=8192
    )
    prefill_expected_time: Annotated[int, Ignored()] = Field(default=1500, ge=1, le=10000)
    decode_expected_time: Annotated[int, Ignored()] = Field(default=50, ge=1, le=10000)
    dynamic_batch_size_enable: IgnoredBool = False
    buffer_response_enabled: IgnoredBool = False
    distributed_enable: Annotated[bool, ONE_MACHINE] = False
    enable_prefix_cache: Annotated[bool, NO_PREFIX_CACHE] = False
    enable_split: Annotated[bool, CHUNKS] = False
    split_type: Annotated[bool, CHUNKS] = False
    split_start_type: Annotated[bool, CHUNKS] = False
    split_chunk_tokens: Annotated[int | None, CHUNKS] = Field(default=None, ge=0)
    split_start_batch_size: Annotated[int | None, CHUNKS] = Field(default=None, ge=0)
    prefill_chunk_size: Annotated[int | None, CHUNKS] = Field(default=None, ge=0)
    max_num_partial_prefills: Annotated[int, CHUNKS] = Field(default=64, ge=1, le=64)
    max_long_partial_prefills: Annotated[int, CHUNKS] = Field(default=8, ge=1)
    long_prefill_token_threshold: Annotated[int, CHUNKS] = Field(default=1024, ge=1, le=8192)
    layerwise_disaggregated: IgnoredObject = None


class KvPoolConfig(Section):
    """`kvPoolConfig`: a KV cache outside of the router."""

    backend: Annotated[str, NO_PREFIX_CACHE] = ""
    config_path: Annotated[str, NO_PREFIX_CACHE] = ""
    async_write: Annotated[bool, NO_PREFIX_CACHE] = False


class BackendConfig(BackendTls):
    """`BackendConfig`: the usual place of ModelDeployConfig and ScheduleConfig."""

    backend_name: Annotated[
        str,
        matching(r"[a-z_]{1,50}", "must be 1 to 50 lower-case letters and underscores"),
        Ignored("there is one back end"),
    ] = "mindieservice_llm_engine"
    model_instance_number: Annotated[int, Ignored("one model is served by one router")] = Field(
        default=1, ge=1, le=10
    )
    npu_device_ids: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0)], ...], ...], Ignored("ExpertMesh.device says what computes")
    ] = ((0, 1, 2, 3),)
    tokenizer_process_number: Annotated[int, Ignored("the router's front tokenizes")] = Field(
        default=8, ge=1, le=32
    )
    multi_nodes_infer_enabled: Annotated[bool, ONE_MACHINE] = False
    multi_nodes_infer_port: IgnoredPort = 1120
    inter_node_tls_enabled: bool = Field(default=False, alias="interNodeTLSEnabled")
    kv_pool_config: KvPoolConfig = KvPoolConfig()
    layerwise_disaggregated: IgnoredObject = None
    model_deploy_config: ModelDeployConfig | None = Field(default=None, alias="ModelDeployConfig")
    schedule_config: ScheduleConfig | None = Field(default=None, alias="ScheduleConfig")


class LogConfig(Section):
    """`LogConfig`: a log level for some hours."""

    dynamic_log_level: Annotated[str, Ignored("ExpertMesh.logLevel says what is logged")] = ""
    dynamic_log_level_valid_hours: Annotated[int, Ignored()] = Field(default=2, ge=1, le=168)
    dynamic_log_level_valid_time: IgnoredText = ""
