"""The router's front: its servers, its engine and its fleet, put together. No torch in this process."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common.channel import Shutdown
from common.config import Config, Effective, fleet_token
from common.environment import rank_table
from common.errors import ConfigError, NotReady, StreamLost
from common.grpc_server import RunningServer, start_server
from common.interceptors import FleetTokenInterceptor
from common.kept_child import KeptChild, Kind
from common.logs import set_level
from common.model_config import ModelConfig
from common.own_address import own_address
from common.weight_sizes import computed_dtype
from protos import admin_pb2_grpc, fleet_pb2_grpc, generation_pb2_grpc
from protos import generation_pb2 as pb
from router.front.admin_service import AdminService
from router.front.config_history import ConfigHistory
from router.front.config_in_force import ConfigInForce
from router.front.engine_tuning import EngineTuning, tune_of
from router.front.epochs import Epochs
from router.front.expert_side import ExpertSide, RouterFacts, check_fixed
from router.front.fleet import Fleet
from router.front.generation_service import GenerationService
from router.front.heartbeats import Heartbeats
from router.front.journal import End, Journal
from router.front.load_inquiry import LoadInquiry
from router.front.recovery import Recovery
from router.front.reload import Reload
from router.front.rollout import Rollout
from router.front.sampling_params import Limits
from router.front.service_state import ServiceState
from router.front.status import status_of
from router.front.version_files import VersionFiles
from router.messages import (
    TO_FRONT,
    Abort,
    AskProgress,
    Configure,
    Linked,
    LinkFailed,
    Loaded,
    Loading,
    Loads,
    Lost,
    Progress,
    Rejected,
    Stats,
    Tokens,
    Tuned,
    TuneRefused,
)
from router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GENERATION = "expertmesh.v1.GenerationService"
ADMIN = "expertmesh.v1.AdminService"
FLEET = "expertmesh.v1.FleetService"
READINESS = "readiness"
ENGINE_MODULE = "router.engine_process"
STOP_GRACE_S = 1.0
ENGINE_GRACE_S = 5.0


class Front:
    """One router, from its first line of output to its last."""

    def __init__(self, at_start: Effective, engine_module: str = ENGINE_MODULE) -> None:
        config = at_start.config
        if config.model_path is None:
            raise ConfigError(
                "no checkpoint is configured: set ModelDeployConfig.ModelConfig[0].modelWeightPath"
            )
        self.model_path = str(Path(config.model_path).resolve())
        self.model = ModelConfig.from_directory(Path(config.model_path))
        table = None if config.experts_in_process else rank_table()
        self._check_fixed = partial(check_fixed, self.model, table)
        self._check_fixed(config)
        self.dtype = computed_dtype(config, self.model)
        self.eos_token_ids = tuple(self.model.eos_token_ids(Path(config.model_path)))
        self.tokenizer = Tokenizer.from_directory(Path(config.model_path), self.model.vocab_size)
        # Grows with every start, so that workers can tell an old router from a new one.
        self.term = time.time_ns() // 1_000_000
        self.journal = Journal(lambda: self.config.max_queued_requests)
        self._recovery = Recovery(lambda: self.config.recovery_timeout_s, self._end_answers)
        self.state = ServiceState(
            not config.experts_in_process, self._recovery, num_streams=lambda: len(self.journal)
        )
        self.state.on_ready_change = self._ready_changed
        kind = Kind("the router's engine", engine_module, TO_FRONT, Loaded)
        self.engine = KeptChild(kind, self._configure, self._from_engine, self._engine_ended)
        self.fleet = Fleet(table)
        self._expert_side: ExpertSide | None = None
        self.heartbeats: Heartbeats | None = None
        self.epochs: Epochs | None = None
        self.tuning = EngineTuning(self.engine.send, self.engine.kill, lambda: self.state.loaded is not None)
        self._loads = LoadInquiry(self.engine.send, lambda: self.state.loaded is not None)
        self._token = "" if config.experts_in_process else fleet_token(config)
        self._servers: dict[str, RunningServer] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._has_said_ready = False
        # Last, so that a checkpoint that cannot be served leaves no version behind.
        files = None if config.state_dir is None else VersionFiles(Path(config.state_dir))
        self._history = ConfigHistory(files)
        self.in_force = ConfigInForce(at_start, self._history)
        self._rollout = Rollout(self.tuning)
        self.reload = Reload(
            self.in_force, self._history, self._rollout, self._check_reload, self._config_changed
        )

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.in_force.config

    async def listen(self) -> str:
        """Open all ports; return the line that says where.

        Raises:
            ConfigError: an address cannot be bound.
        """
        config = self.config
        generation = GenerationService(
            self.journal, self.state, self.tokenizer, self._limits, self._describe, self.engine.send
        )
        admin = AdminService(
            self.in_force, self._history, self.reload, self.state, self._snapshot, self._loads
        )
        self._servers["grpc"] = await start_server(
            config.host,
            config.port,
            lambda server: generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server),
            (GENERATION, READINESS),
        )
        self._servers["admin"] = await start_server(
            config.management_host,
            config.management_port,
            lambda server: admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server),
            (ADMIN, READINESS),
        )
        if not config.experts_in_process:
            self._servers["fleet"] = await self._listen_for_workers()
        return "listening " + self._addresses()

    async def run(self) -> None:
        """Keep the engine running and prepare epochs, until cancelled or the engine cannot be started.

        Raises:
            ExpertMeshError: the engine could not load.
        """
        work = [asyncio.create_task(self.engine.run())]
        if self.epochs is not None:
            work.append(asyncio.create_task(self.epochs.run()))
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work[1:]:
                task.cancel()
            await self._end_engine(work[0])

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let running ones finish, for at most `timeout_s`."""
        self.state.drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self.journal.wait_empty()
        except TimeoutError:
            logger.warning("%d requests had not finished after %.1f s", len(self.journal), timeout_s)

    async def close(self) -> None:
        """End what is still running, and close all ports."""
        error = StreamLost("the router is shutting down", "DRAINING")
        self.journal.finish_all(End(error=error))
        await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in self._servers.values()))
        await self.reload.finish()
        self._history.close()
        if self.heartbeats is not None:
            await self.heartbeats.stop()

    def reread_file(self) -> None:
        """Put in force what the file given at start holds now; what goes wrong is logged."""
        self._spawn(self.reload.reread())

    async def _end_engine(self, work: asyncio.Task[None]) -> None:
        # An engine that is stopped does not agree to anything any more, joins nobody, and is not waited for.
        self._recovery.close()
        self.tuning.engine_ended()
        if self.epochs is not None:
            self.epochs.engine_ended()
        self._loads.engine_ended()
        await self.engine.stop(Shutdown(), ENGINE_GRACE_S)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    async def _listen_for_workers(self) -> RunningServer:
        config = self.config
        side = self._expert_side = ExpertSide(
            RouterFacts(self.term, self.model_path, self.dtype, self.model),
            lambda: self.config,
            self.fleet,
            self.state,
            self._token,
            self.engine.send,
        )
        self.heartbeats, self.epochs = side.heartbeats, side.epochs
        self._rollout.epochs = side.epochs
        return await start_server(
            config.fleet_host,
            config.fleet_port,
            lambda server: fleet_pb2_grpc.add_FleetServiceServicer_to_server(side.service, server),
            (FLEET,),
            [FleetTokenInterceptor(self._token)],
        )

    def _from_engine(self, message: Any) -> None:
        match message:
            case Tokens():
                self.journal.take(message.events)
                self.state.tokens_arrived()
            case Stats():
                self.state.engine_stats(message)
            case Loading():
                self.state.engine_loading(message)
            case Loaded():
                self._engine_loaded(message)
            case Rejected():
                error = NotReady(message.message, "REJECTED")
                self.journal.finish([message.request_id], End(error=error))
            case Lost():
                self._engine_lost(message)
            case Loads():
                self._loads.answered(message)
            case Tuned() | TuneRefused():
                self.tuning.answered(message)
            case _:
                self._about_links(message)

    def _engine_loaded(self, message: Loaded) -> None:
        self.state.engine_loaded(message)
        for submit in self.journal.unfinished():  # of an engine that ended
            self.engine.send(submit)
        if self.epochs is not None:
            self.epochs.wake()

    def _about_links(self, message: Any) -> None:
        if self.epochs is None:
            return
        match message:
            case Linked():
                self.epochs.linked(message)
            case LinkFailed():
                self.epochs.link_failed(message)
            case AskProgress():
                self._spawn(self._answer_progress(message))

    def _engine_lost(self, message: Lost) -> None:
        if self.epochs is None or self.heartbeats is None:
            return
        logger.warning("epoch %d: %s", message.epoch, message.message)
        if message.ep_rank >= 0:
            self._recovery.explain(message.message)
            if self.epochs.has_ranks_of(message.epoch):
                self.heartbeats.lost_by_engine(message.ep_rank, message.message)
        self.epochs.engine_lost_epoch(message.epoch, message.message)

    async def _answer_progress(self, message: AskProgress) -> None:
        if self.heartbeats is not None:
            progress = await self.heartbeats.progress_of(message.ep_rank)
            self.engine.send(Progress(message.ask_id, progress))

    def _end_answers(self, error: StreamLost) -> None:
        """Nothing was computed for too long: end every answer, and have the engine forget it."""
        for request_id in self.journal.finish_all(End(error=error)):
            self.engine.send(Abort(request_id))
        self.state.announce()

    def _engine_ended(self, why: str) -> None:
        self.state.engine_ended(why)
        self.tuning.engine_ended()
        if self.epochs is not None:
            self.epochs.engine_ended()

    def _ready_changed(self, is_ready: bool) -> None:
        self._spawn(self._set_serving())
        if is_ready and not self._has_said_ready and self._servers:
            self._has_said_ready = True
            line = " ".join(f"{name}={self._servers[name].address}" for name in ("grpc", "admin"))
            sys.stdout.write(f"ready {line}\n")
            sys.stdout.flush()

    async def _set_serving(self) -> None:
        for server in self._servers.values():
            await server.set_serving(self.state.is_ready)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _addresses(self) -> str:
        return " ".join(f"{name}={server.address}" for name, server in self._servers.items())

    async def _check_reload(self, after: Effective) -> None:
        self._check_fixed(after.config)
        if self._expert_side is not None:
            await self._expert_side.check_reload(after)

    def _config_changed(self, before: Config, after: Config) -> None:
        if before.log_level != after.log_level:
            set_level(after.log_level)
        self._recovery.timeout_changed()
        if self.epochs is not None:
            self.epochs.wake()  # what is in force must not forbid the epoch
        self.state.announce()

    def _configure(self) -> Configure:
        config = self.config
        self.tuning.engine_started()
        return Configure(
            model_path=self.model_path,
            dtype=self.dtype,
            device=config.device,
            threads=config.threads,
            kv_cache_bytes=config.kv_cache_bytes,
            block_size=config.block_size,
            max_seq_len=config.max_seq_len,
            tune=asdict(tune_of(config, 0)),
            term=self.term,
            data_address=own_address(config.data_address),
            exchange=config.exchange,
            same_host_transport=config.same_host_transport,
            experts_in_process=config.experts_in_process,
            trace_file=None if config.trace_file is None else str(Path(config.trace_file).resolve()),
        )

    def _limits(self) -> Limits:
        if self.state.last_loaded is None:
            raise NotReady("the router is loading its weights")
        max_seq_len = self.state.last_loaded.max_seq_len
        longest_prompt = max_seq_len - 1
        return Limits(
            vocab_size=self.model.vocab_size,
            max_seq_len=max_seq_len,
            max_prompt_len=min(self.config.max_input_token_len or longest_prompt, longest_prompt),
            max_new_tokens=self.config.max_iter_times,
            truncation=self.config.truncation,
            eos_token_ids=self.eos_token_ids,
        )

    def _describe(self) -> pb.GetModelInfoResponse:
        limits = self._limits() if self.state.last_loaded is not None else None
        model = self.model
        return pb.GetModelInfoResponse(
            model_name=self.config.model_name,
            model_type=model.model_type,
            model_path=str(self.config.model_path),
            dtype=self.dtype,
            vocab_size=model.vocab_size,
            max_seq_len=limits.max_seq_len if limits else self.config.max_seq_len or 0,
            max_input_token_len=limits.max_prompt_len if limits else self.config.max_input_token_len or 0,
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self.tokenizer.bos_token_id,
            n_routed_experts=model.n_routed_experts,
            num_experts_per_tok=model.num_experts_per_tok,
        )

    def _snapshot(self) -> Any:
        coverage = 0.0 if self._expert_side is None else self._expert_side.coverage
        return status_of(self.in_force, self.term, self.state, self.fleet, self.journal, coverage)
