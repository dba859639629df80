"""One worker's way into an epoch: PrepareEpoch, loading, loaded, linked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.errors import ControlError, EpochRefused
from protos import fleet_pb2 as pb
from router.front.agent_link import AgentLink
from router.front.fleet import LOADING, READY, SERVING


class Preparation:
    """Follows one PrepareEpoch stream. `loaded` and `linked` complete, or fail with ControlError."""

    def __init__(
        self,
        agent: AgentLink,
        request: pb.PrepareEpochRequest,
        on_change: Callable[[], None],
        is_shown: bool,
    ) -> None:
        """Begin.

        Args:
            agent: of the worker.
            request: what it is asked for.
            on_change: called whenever it has got further.
            is_shown: the worker's state is how far it is, and failures count; else it is serving meanwhile.
        """
        loop = asyncio.get_running_loop()
        self.agent = agent
        self.loaded: asyncio.Future[None] = loop.create_future()
        self.linked: asyncio.Future[None] = loop.create_future()
        self._request = request
        self._on_change = on_change
        self._is_shown = is_shown
        self._task = asyncio.create_task(self._run(), name=f"prepare {agent.worker.worker_id}")

    async def cancel(self) -> None:
        """End the stream and wait until it has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for future in (self.loaded, self.linked):
            future.cancel()
            if future.done() and not future.cancelled():
                future.exception()  # seen: nobody waits for it any more

    async def _run(self) -> None:
        worker = self.agent.worker
        if self._is_shown:
            worker.state, worker.num_local_experts = LOADING, _experts_per_layer(self._request)
        try:
            async for response in self.agent.prepare(self._request):
                self._take(response)
                self._on_change()
            if not self.linked.done():
                raise ControlError(
                    f"expert worker {worker.worker_id} ended PrepareEpoch before it was linked"
                )
        except ControlError as error:
            # Another executor would refuse too, and one that serves another epoch has not failed at that.
            worker.failures += self._is_shown and not isinstance(error, EpochRefused)
            for future in (self.loaded, self.linked):
                if not future.done():
                    future.set_exception(error)

    def _take(self, response: pb.PrepareEpochResponse) -> None:
        worker, is_shown = self.agent.worker, self._is_shown
        match response.WhichOneof("event"):
            case "loading":
                worker.loaded_bytes = response.loading.loaded_bytes
                worker.total_bytes = response.loading.total_bytes
            case "loaded":
                worker.loaded_bytes = worker.total_bytes = response.loaded.loaded_bytes
                worker.state = READY if is_shown else worker.state
                _complete(self.loaded)
            case "linked":
                if is_shown:
                    worker.state, worker.failures = SERVING, 0
                _complete(self.loaded)
                _complete(self.linked)
            case "refused":
                raise EpochRefused(worker.worker_id, response.refused.reason)


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _experts_per_layer(request: pb.PrepareEpochRequest) -> int:
    return max((len(layer.expert_ids) for layer in request.layers), default=0)
