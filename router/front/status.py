"""The state of router and fleet as one GetStatusResponse."""

from __future__ import annotations

import time

from protos import admin_pb2 as pb
from router.front.config_in_force import ConfigInForce
from router.front.fleet import Fleet, Worker
from router.front.journal import Journal
from router.front.service_state import ServiceState


def status_of(
    in_force: ConfigInForce,
    term: int,
    state: ServiceState,
    fleet: Fleet,
    journal: Journal,
    coverage: float,
) -> pb.GetStatusResponse:
    """Take a snapshot; `coverage` is the share of experts that survive any one loss from now on."""
    config = in_force.config
    stats, loaded = state.stats, state.loaded
    times = stats.workers if stats is not None and state.is_linked else []
    status = pb.GetStatusResponse(
        ready=state.is_ready,
        not_ready_reason=state.why_not_ready,
        epoch=state.epoch,
        term=term,
        config_version=in_force.version.number,
        ep_level=config.ep_level,
        expected_workers=config.world_size,
        workers=[_worker(worker, times, config.grouped_matmul) for worker in _by_rank(fleet)],
        num_requests_running=stats.num_running if stats else 0,
        num_requests_waiting=stats.num_waiting if stats else journal.num_waiting,
        kv_blocks_used=stats.kv_blocks_used if stats else 0,
        kv_blocks_total=loaded.kv_blocks if loaded else 0,
        warnings=[*in_force.warnings, *_fleet_warnings(fleet, state, config.world_size)],
        model_name=config.model_name,
        engine_state=state.engine_state,
        num_steps=stats.num_steps if stats else 0,
        a2a_overflow_rounds=stats.extra_rounds if stats else 0,
        cutoff_extra_passes=stats.extra_passes if stats else 0,
        coverage=coverage,
        recoveries=state.recovery.num_recoveries,
        recovery_seconds=state.recovery.last_s,
        replayed_steps_total=stats.replayed_steps if stats else 0,
    )
    if loaded is not None:
        status.engine_loaded_bytes = status.engine_total_bytes = loaded.loaded_bytes
    elif state.loading is not None:
        status.engine_loaded_bytes = state.loading.loaded_bytes
        status.engine_total_bytes = state.loading.total_bytes
    return status


def _by_rank(fleet: Fleet) -> list[Worker]:
    return sorted(fleet.workers.values(), key=lambda one: (one.ep_rank < 0, one.ep_rank, one.order))


def _worker(worker: Worker, times: list[list[float]], grouped_matmul: str) -> pb.ExpertWorkerStatus:
    is_off = grouped_matmul == "off"
    status = pb.ExpertWorkerStatus(
        ep_rank=worker.ep_rank,
        worker_id=worker.worker_id,
        address=worker.address,
        device=worker.device,
        state=worker.state,
        num_local_experts=worker.num_local_experts,
        loaded_bytes=worker.loaded_bytes,
        total_bytes=worker.total_bytes,
        last_heartbeat_s=max(time.monotonic() - worker.heard_s, 0.0),
        incarnation=worker.incarnation,
        arithmetic=worker.arithmetic,
        grouped_matmul="one product after another for each expert: groupedMatmul is off"
        if is_off
        else worker.grouped_matmul,
        transport=worker.transport,
    )
    if 0 <= worker.ep_rank < len(times) and len(times[worker.ep_rank]) == 3:
        receive_s, compute_s, reply_s = times[worker.ep_rank]
        status.last_step.receive_s, status.last_step.compute_s = receive_s, compute_s
        status.last_step.reply_s = reply_s
    return status


def _fleet_warnings(fleet: Fleet, state: ServiceState, world_size: int) -> list[str]:
    found = []
    num_members = sum(worker.ep_rank >= 0 for worker in fleet.workers.values())
    if state.is_linked and num_members < world_size:
        found.append(
            f"{num_members} of {world_size} expert workers serve: together they hold all experts; the others "
            "join when they are back and have loaded"
        )
    arithmetics = fleet.arithmetics()
    if len(arithmetics) <= 1:
        return found
    return [
        *found,
        f"expert workers compute in {len(arithmetics)} different ways ({', '.join(sorted(arithmetics))}): "
        "answers differ in bits",
    ]
