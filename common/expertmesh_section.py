"""Section `ExpertMesh` of the configuration file: what MindIE's layout has no place for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.section import Address, Port, Section, matching

Seconds = Annotated[float, Field(gt=0, le=86400)]


class ExpertMeshSection(Section, extra="forbid"):
    """Our own choices; each can be set as EXPERTMESH_<UPPER_SNAKE> too, like EXPERTMESH_FLEET_PORT."""

    fleet_port: Port = 1028
    fleet_address: Address | None = None
    data_address: Address = "127.0.0.1"
    http_port: Port | None = None
    device: Literal["cpu", "cuda", "npu"] = "cpu"
    device_id: int | None = Field(default=None, ge=0, le=63)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    experts_in_process: bool = False
    exchange: Literal["auto", "links", "collective"] = "auto"
    same_host_transport: Literal["auto", "sharedMemory", "links"] = "auto"
    micro_batches: int = Field(default=1, ge=1, le=8)
    chunk_rows: int = Field(default=4096, ge=0)
    grouped_matmul: Literal["auto", "on", "off"] = "auto"
    redundant_experts: int = Field(default=0, ge=0)
    expert_load_file: str | None = Field(default=None, min_length=1)
    topology: Literal["auto", "switch", "direct"] = "auto"
    cutoff_min_rows: int = Field(default=4096, ge=1)
    threads: int | None = Field(default=None, ge=1, le=1024)
    register_timeout_seconds: Seconds = 60.0
    fleet_token_file: str | None = Field(default=None, min_length=1)
    deadline_floor_seconds: float = Field(default=0.25, gt=0, le=60)
    recovery_timeout_seconds: float = Field(default=120.0, ge=0, le=86400)
    drain_timeout_seconds: float = Field(default=30.0, ge=0, le=86400)
    trace_file: str | None = Field(default=None, min_length=1)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_queued_requests: int = Field(default=1000, ge=1, le=1 << 20)
    router: Annotated[str | None, matching(r".+:[0-9]{1,5}", "must be HOST:PORT")] = None
    worker_id: Annotated[
        str | None,
        matching(
            r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}",
            "must be at most 128 letters, digits, dots, dashes and underscores, and begin with a letter or a "
            "digit",
        ),
    ] = None
    agent_address: Address | None = None
    agent_port: Port = 0
    advertise_address: Annotated[
        str | None, matching(r".+:[0-9]{1,5}|[^:]+", "must be HOST or HOST:PORT")
    ] = None
    state_dir: str | None = Field(default=None, min_length=1)
