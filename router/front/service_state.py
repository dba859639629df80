"""What the front knows about its service: is it ready, why not, what is its engine doing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import NotReady
from router.front.recovery import ENGINE_LOST, WORKER_LOST, Recovery
from router.messages import Loaded, Loading, Stats

LOADING, READY, RESTARTING = "loading", "ready", "restarting"


@dataclass(slots=True)
class ServiceState:
    """Facts that requests, status and health are answered from. Owned by the event loop.

    Attributes:
        needs_epoch: False where the experts are in the engine's process.
        recovery: whether answers wait for what was lost.
        num_streams: how many answers are open.
        loaded, last_loaded: what the engine said of itself, and what the one before said while it is none.
        waiting_for: one sentence on what the next epoch waits for.
    """

    needs_epoch: bool
    recovery: Recovery
    num_streams: Callable[[], int]
    engine_state: str = LOADING
    loading: Loading | None = None
    loaded: Loaded | None = None
    last_loaded: Loaded | None = None
    stats: Stats | None = None
    epoch: int = 0
    is_linked: bool = False
    is_draining: bool = False
    waiting_for: str = "no expert worker has registered yet"
    on_ready_change: Callable[[bool], None] | None = None
    _was_ready: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self.why_not_ready == ""

    @property
    def why_not_ready(self) -> str:
        """One sentence, empty when ready."""
        if self.is_draining:
            return "the router is shutting down and takes no new requests"
        obstacle = self._obstacle
        if obstacle and self.recovery.is_waiting:
            count = self.num_streams()
            wait = "1 stream waits" if count == 1 else f"{count} streams wait"
            return f"recovering: {self.recovery.why}; {wait}; {obstacle}"
        return obstacle

    @property
    def _obstacle(self) -> str:
        """What keeps steps from being computed; empty where nothing does."""
        if self.loaded is None:
            if self.engine_state == RESTARTING:
                return "the router's engine ended and is being restarted"
            done = (
                f" ({self.loading.loaded_bytes} of {self.loading.total_bytes} bytes)" if self.loading else ""
            )
            return f"the router is loading its weights{done}"
        if self.needs_epoch and not self.is_linked:
            return self.waiting_for
        return ""

    def check_admits(self) -> None:
        """Refuse what cannot be served now or after a recovery that is under way.

        Raises:
            NotReady: with the reason.
        """
        if self.is_draining:
            raise NotReady(self.why_not_ready, "DRAINING")
        if self._obstacle and not self.recovery.is_waiting:
            raise NotReady(self._obstacle, "NOT_READY")

    def engine_loading(self, message: Loading) -> None:
        """The engine has read some weights."""
        self.loading = message
        self.announce()

    def engine_loaded(self, message: Loaded) -> None:
        """The engine has all its weights."""
        self.loaded = self.last_loaded = message
        self.engine_state = READY
        self.announce()

    def engine_stats(self, message: Stats) -> None:
        """The engine counted what it does."""
        self.stats = message
        self._look_whether_settled()
        self.announce()

    def engine_ended(self, why: str) -> None:
        """The engine is gone; a new one is started."""
        self.loaded = self.loading = self.stats = None
        self.engine_state, self.is_linked = RESTARTING, False
        self.recovery.begin(why, ENGINE_LOST)
        self.announce()

    def tokens_arrived(self) -> None:
        """The engine has given tokens."""
        # They may be of a step that was computed before what was lost was noticed.
        if not self._obstacle:
            self.recovery.settled()

    def epoch_begun(self, epoch: int) -> None:
        """All links of an epoch are up."""
        self.epoch, self.is_linked, self.waiting_for = epoch, True, ""
        # The engine may have taken its first step before the last worker said that it is linked.
        self._look_whether_settled()
        self.announce()

    def epoch_over(self, why: str) -> None:
        """The epoch in force lost a member: `why` is one sentence."""
        self.is_linked = False
        self.waiting_for = f"epoch {self.epoch} is over and the next is not ready"
        self.recovery.begin(why, WORKER_LOST)
        self.announce()

    def wait_for(self, what: str) -> None:
        """Say what the next epoch waits for."""
        if what != self.waiting_for:
            self.waiting_for = what
            self.announce()

    def drain(self) -> None:
        """Take no new requests from now on."""
        self.is_draining = True
        self.announce()

    def announce(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
        if self.is_ready != self._was_ready:
            self._was_ready = self.is_ready
            if self.on_ready_change is not None:
                self.on_ready_change(self._was_ready)

    def _look_whether_settled(self) -> None:
        """The recovery is over when a step has settled, or when no answer waits for one."""
        stats = self.stats
        if stats is None or self._obstacle or (self.needs_epoch and stats.epoch != self.epoch):
            return
        # An engine that was started again computes what it had computed before; only a token is progress.
        if not self.recovery.is_engine_lost or self.num_streams() == 0:
            self.recovery.settled()

    async def wait_changed(self, timeout_s: float) -> None:
        """Return at the next change, or when the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
