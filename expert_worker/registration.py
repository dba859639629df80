"""How a worker becomes known to its router, and known again when either of them was replaced. Torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import grpc

from common.errors import ConfigError, ControlError
from common.grpc_server import CHANNEL_OPTIONS
from common.interceptors import token_metadata
from protos import fleet_pb2 as pb
from protos import fleet_pb2_grpc

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
FIRST_RETRY_DELAY_S = 0.2
LONGEST_RETRY_DELAY_S = 2.0
MISSES_TO_LOSE = 5
"""A router that was silent for so many of its own heartbeat intervals is taken for lost."""

FINAL = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Asking again would not help."""


class Registration:
    """Keeps one worker registered with the router at one address.

    Attributes:
        term: the router's term, 0 before the first registration.
    """

    def __init__(
        self,
        router: str,
        token: str,
        timeout_s: float,
        introduction: Callable[[], pb.RegisterRequest],
        has_started: asyncio.Event,
        is_new: asyncio.Event,
        on_term_over: Callable[[int], None],
    ) -> None:
        """Prepare to register.

        Args:
            router: HOST:PORT of FleetService.
            token: the fleet's.
            timeout_s: how long to try, at start and after every loss.
            introduction: what the worker says of itself now.
            has_started: set while there is an executor that can be introduced.
            is_new: set when it is another than before.
            on_term_over: called with a term whose router is gone.
        """
        self.term = 0
        self._router = router
        self._metadata = token_metadata(token)
        self._timeout_s = timeout_s
        self._introduction = introduction
        self._has_started = has_started
        self._is_new = is_new
        self._on_term_over = on_term_over
        self._heard_s = 0.0
        self._is_read = asyncio.Event()
        self._is_read.set()

    async def is_of(self, term: int) -> bool:
        """Whether this worker has registered with the router of a term.

        A router may call as soon as it has answered, so while an answer is on its way it is waited for,
        as long as a registration may take.
        """
        if term != self.term:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await self._is_read.wait()
        return term == self.term

    def heard(self) -> None:
        """The router has called."""
        self._heard_s = time.monotonic()

    async def run(self) -> None:
        """Register, and again whenever the executor or the router was replaced.

        Raises:
            ConfigError: the router refuses this worker.
            ControlError: the router could not be reached for too long.
        """
        while True:
            await self._has_started.wait()
            response = await self._register()
            await self._until_lost(response.heartbeat_interval_s)

    async def _until_lost(self, interval_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s / 2):
                    # The router waits for whoever was lost: it hears of the next at once.
                    await self._is_new.wait()
            silent_s = time.monotonic() - self._heard_s
            if silent_s > MISSES_TO_LOSE * interval_s:
                logger.warning("the router at %s has been silent for %.1f s", self._router, silent_s)
                return
            if self._is_new.is_set():
                return

    async def _register(self) -> pb.RegisterResponse:
        began_s = time.monotonic()
        delay_s = FIRST_RETRY_DELAY_S
        while True:
            request = self._introduction()
            self._is_new.clear()
            try:
                return await self._call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() in FINAL:
                    raise self._refused(request, error) from None
                if time.monotonic() - began_s + delay_s > self._timeout_s:
                    raise self._unreachable(request, error) from None
                logger.info("registering at %s failed, trying again: %s", self._router, error.details())
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_DELAY_S)

    async def _call(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        self._is_read.clear()
        try:
            # A new channel each time: an old one would wait out its own reconnection delays.
            async with grpc.aio.insecure_channel(self._router, options=CHANNEL_OPTIONS) as channel:
                stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(channel)
                response = await stub.Register(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)
                self._registered(response)
        finally:
            self._is_read.set()
        return response

    def _registered(self, response: pb.RegisterResponse) -> None:
        if self.term not in (0, response.term):
            self._on_term_over(self.term)
        self.term = response.term
        self.heard()
        logger.info("registered with the router at %s, term %d", self._router, response.term)

    def _refused(self, request: pb.RegisterRequest, error: grpc.aio.AioRpcError) -> ConfigError:
        way_out = {
            grpc.StatusCode.UNAUTHENTICATED: "give both the same fleet token",
            grpc.StatusCode.UNIMPLEMENTED: "ExpertMesh.router must name the router's fleet port",
        }.get(error.code(), "change it and start again")
        return ConfigError(
            f"the router at {self._router} refuses expert worker {request.worker_id}: {error.details()}; "
            f"{way_out}"
        )

    def _unreachable(self, request: pb.RegisterRequest, error: grpc.aio.AioRpcError) -> ControlError:
        return ControlError(
            f"expert worker {request.worker_id} could not register with the router at {self._router} within "
            f"{self._timeout_s:g} s (registerTimeoutSeconds): {error.details()}; start the router, or "
            "correct ExpertMesh.router"
        )
