"""Epochs: the one path by which the fleet changes; start-up, a loss, a return and a reload end in the next.

PrepareEpoch on all members, Connect to the engine when all have loaded, Linked: the next step commits it.
What a reload asks for is prepared beside the epoch in force, and so is the return of a worker that the others
did not have to wait for, since they hold all experts; the engine holds such an epoch until it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from common.config import Config
from common.errors import ConfigError, ControlError, EpochRefused
from common.placement import Placement
from router.front.allowance import Allowance
from router.front.epoch_attempt import EpochAttempt, EpochFacts, Reach
from router.front.epoch_plan import (
    Candidate,
    Seating,
    missing_sentence,
    place_workers,
    seat_all,
    seat_survivors,
)
from router.front.fleet import LOST, REGISTERED, SERVING, Fleet, Worker
from router.front.service_state import ServiceState
from router.messages import Disconnect, Linked, LinkFailed, TakeUp

logger = logging.getLogger(__name__)

FIRST_RETRY_DELAY_S = 0.2
LONGEST_RETRY_DELAY_S = 8.0
ANSWER_TIMEOUT_S = 5.0
"""How long a worker's executor may take to say whether it could go on, or still can."""


class Epochs:
    """Prepares the next epoch whenever there is none in force and enough workers are alive."""

    def __init__(
        self,
        facts: EpochFacts,
        config: Callable[[], Config],
        fleet: Fleet,
        state: ServiceState,
        reach: Reach,
        allowance: Allowance,
    ) -> None:
        """Take part with what is handed over; `config` is the configuration in force."""
        self._facts = facts
        self._config = config
        self._fleet = fleet
        self._state = state
        self._reach = reach
        self._allowance = allowance
        self._last_epoch = 0
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._attempt: EpochAttempt | None = None
        self._beside: EpochAttempt | None = None
        self._members: list[Worker] = []
        self._seating: Seating | None = None
        self._holders: dict[str, tuple[Worker, int]] = {}
        self._survivors_failed = False

    def wake(self) -> None:
        """Something changed: look again whether an epoch can be prepared."""
        self._wake.set()

    def wake_at_once(self) -> None:
        """Somebody came or was lost: what failed before may succeed now."""
        self._urgent.set()
        self._wake.set()

    def is_member(self, worker: Worker) -> bool:
        """Whether this start of this worker is in an epoch that is prepared or in force."""
        groups = [self._members, *(attempt.members for attempt in self._attempts)]
        return any(member is worker for group in groups for member in group)

    @property
    def members(self) -> list[Worker]:
        """The members of the epoch that is prepared or in force, by ep_rank; none without one."""
        return list(self._members)

    @property
    def placement(self) -> Placement:
        """Who holds what in the epoch that is prepared or in force; without one, of the whole group."""
        return self._facts.placement if self._seating is None else self._seating.placement

    def worker_lost(self, worker: Worker, reason: str) -> None:
        """A worker is gone, or started anew: an epoch with it is over."""
        logger.warning("expert worker %s (ep_rank %d): %s", worker.worker_id, worker.ep_rank, reason)
        worker.state = LOST
        why = f"expert worker {worker.worker_id} was lost: {reason}"
        if any(member is worker for member in self._members):
            self._give_up(why, tell_engine=True)
        elif self._beside is not None and self.is_member(worker):
            self._beside.fail(why)
        self.wake_at_once()

    def has_ranks_of(self, epoch: int) -> bool:
        """Whether the ranks that workers have now are those of an epoch."""
        if self._state.is_linked:
            return epoch == self._state.epoch
        return self._attempt is not None and epoch == self._attempt.epoch

    def engine_lost_epoch(self, epoch: int, reason: str) -> None:
        """The engine dropped an epoch: one of its links failed.

        It may have taken the first step, and lost it, before all workers have said that they are linked.
        """
        if self._state.is_linked and epoch == self._state.epoch:
            self._give_up(reason, tell_engine=False)
        elif self._attempt is not None and epoch == self._attempt.epoch:
            self._attempt.fail(reason)
        self.wake()

    def engine_ended(self) -> None:
        """The engine is gone and every link with it."""
        self._give_up("the router's engine ended", tell_engine=False)

    def linked(self, message: Linked) -> None:
        """The engine has all links of an epoch."""
        for attempt in self._attempts:
            attempt.linked(message)

    def link_failed(self, message: LinkFailed) -> None:
        """The engine could not make a link."""
        for attempt in self._attempts:
            attempt.link_failed(message)

    async def ask(self, config: Config) -> dict[str, str]:
        """Ask those who are members, or would be, whether they could go on with another configuration.

        Returns:
            Why not, by worker_id, for those who could not.

        Raises:
            ControlError: one of them does not answer.
        """
        seating = self._next_seating()
        return await self._ask(self._members or self._fleet.named(seating.members if seating else ()), config)

    async def prepare_beside(self, config: Config) -> EpochAttempt | None:
        """Have the members of the epoch in force prepare the next, for another configuration, beside it.

        Returns:
            What `commit` or `give_up` is told about; None where no epoch is in force.

        Raises:
            EpochRefused: a member cannot do what is asked for.
            ControlError: a member or the engine died, or was late.
        """
        if not self._state.is_linked or self._seating is None:
            return None
        if self._beside is not None:
            self._beside.fail("a reload was asked for meanwhile")
        attempt = self._beside = self._next_attempt(self._seating, self._members, config, is_beside=True)
        try:
            await self._get_ready(attempt)
        except BaseException:
            self._beside = None
            raise
        return attempt

    async def confirm(self, attempt: EpochAttempt | None) -> None:
        """Hear from every member's executor that what was prepared still stands.

        Args:
            attempt: what `prepare_beside` returned.

        Raises:
            EpochRefused: a member has changed its mind.
            ControlError: a member or the engine died meanwhile, or an epoch began that was not there before.
        """
        if attempt is None:
            if self._state.is_linked:
                raise ControlError(f"epoch {self._state.epoch} began meanwhile, try again")
            return
        refusals = {} if attempt.failure else await self._ask(attempt.members, attempt.config)
        if attempt.failure:
            raise ControlError(attempt.failure)
        for worker, reason in refusals.items():
            raise EpochRefused(worker, reason)

    def commit(self, attempt: EpochAttempt | None) -> None:
        """Go on with what was prepared; without it, whatever is being prepared is begun anew."""
        if attempt is not None:
            self._beside = None
            self._begin(attempt)
            self.wake()  # somebody may wait to join it
        elif self._attempt is not None:
            self._attempt.fail("the configuration has changed meanwhile")

    def give_up(self, attempt: EpochAttempt | None) -> None:
        """Forget what was prepared; the epoch in force goes on."""
        if attempt is not None:
            self._beside = None
            attempt.fail("the reload was given up")
            self.wake()

    async def run(self) -> None:
        """Prepare epochs for as long as the router lives.

        Raises:
            ConfigError: the members of the first epoch must not form one.
        """
        delay_s = FIRST_RETRY_DELAY_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            why = await self._go_on()
            if why == "":
                delay_s = FIRST_RETRY_DELAY_S
                continue
            logger.warning("the next epoch was not reached: %s", why)
            self._state.wait_for(f"the next epoch was not reached and is tried again: {why}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._urgent.wait()
            delay_s = min(2 * delay_s, LONGEST_RETRY_DELAY_S)
            self._wake.set()

    async def _go_on(self) -> str:
        """Prepare an epoch if one is needed and possible; return why it was not reached, or nothing."""
        self._urgent.clear()
        seating = self._seating if self._state.is_linked else self._next_seating()
        if seating is None:
            return ""
        if why := await self._refusal(self._fleet.named(seating.members)):
            return why
        if self._state.is_linked:
            return await self._grow()
        if self._state.loaded is None or seating != self._next_seating():
            return ""
        return await self._try(seating)

    async def _refusal(self, members: list[Worker]) -> str:
        """Why these must not form an epoch, or go on with one; asked before anybody loads anything for it."""
        try:
            await self._allowance.check(members)
        except ControlError as error:
            return str(error)
        except ConfigError as error:
            if self._state.is_linked:
                self._give_up(str(error), tell_engine=True)
            elif self._state.epoch == 0 and self._fleet.has(members):
                raise
            return str(error)
        return ""

    def _places(self) -> dict[int, str]:
        """Who could have which rank now."""
        alive = [worker for worker in self._fleet.workers.values() if worker.is_alive]
        candidates = [Candidate(worker.worker_id, worker.order, worker.seats) for worker in alive]
        return place_workers(candidates, self._fleet.ranks, self._facts.world_size)

    def _next_seating(self) -> Seating | None:
        """The members of the next epoch, where one is possible now; after a loss, those who need not load."""
        places, placement = self._places(), self._facts.placement
        whole = seat_all(places, placement)
        holders = {name: rank for name, (worker, rank) in self._holders.items() if self._fleet.has([worker])}
        survivors = None if self._fleet.table is not None else seat_survivors(places, holders, placement)
        if survivors is not None and not (whole is not None and self._survivors_failed):
            return survivors
        if whole is None:
            self._state.wait_for(missing_sentence(places, placement.ep_size, self._fleet.table))
        return whole

    async def _grow(self) -> str:
        """Take in those whom the epoch in force did not wait for; return why not, or nothing."""
        if not self._can_grow():
            return ""
        seating = seat_all(self._places(), self._facts.placement)
        if seating is None:
            return ""
        members = self._fleet.named(seating.members)
        try:
            await self._allowance.check_more(members)
        except (ConfigError, ControlError) as error:
            return str(error)
        if not self._can_grow() or not self._fleet.has(members):
            return ""
        return await self._take_in(seating, members)

    def _can_grow(self) -> bool:
        """Whether the epoch in force is of a part of the group, and none is prepared beside it."""
        is_part = len(self._members) < self._facts.world_size
        return self._state.is_linked and self._beside is None and is_part

    async def _take_in(self, seating: Seating, members: list[Worker]) -> str:
        """Have the engine take up an epoch of more members; return why not, or nothing."""
        newcomers = [worker for worker in members if worker not in self._members]
        attempt = self._beside = self._next_attempt(seating, members, self._config(), is_beside=True)
        try:
            await self._get_ready(attempt)
        except ControlError as error:
            for worker in newcomers:
                worker.state = REGISTERED if worker.is_alive else worker.state
            return str(error)
        finally:
            if self._beside is attempt:
                self._beside = None
        self._fleet.assign(seating.members, seating.ranks)
        self._begin(attempt)
        self._reach.send(TakeUp(attempt.epoch))
        return ""

    async def _try(self, seating: Seating) -> str:
        """Prepare one epoch; return why it was not reached, or nothing."""
        self._members, self._seating = self._fleet.assign(seating.members, seating.ranks), seating
        attempt = self._attempt = self._next_attempt(seating, self._members, self._config(), is_beside=False)
        self._state.wait_for(f"epoch {attempt.epoch} is being prepared on {attempt.names}")
        try:
            await self._get_ready(attempt)
        except Exception as error:
            self._members, self._seating = [], None
            self._survivors_failed = True
            if not isinstance(error, ControlError):
                logger.error("preparing epoch %d failed", attempt.epoch, exc_info=error)
            return str(error)
        finally:
            self._attempt = None
        self._begin(attempt)
        return ""

    @property
    def _attempts(self) -> list[EpochAttempt]:
        """What is under way."""
        return [attempt for attempt in (self._attempt, self._beside) if attempt is not None]

    def _next_attempt(
        self, seating: Seating, members: list[Worker], config: Config, is_beside: bool
    ) -> EpochAttempt:
        self._last_epoch += 1
        return EpochAttempt(self._facts, self._last_epoch, seating, members, config, self._reach, is_beside)

    async def _ask(self, workers: list[Worker], config: Config) -> dict[str, str]:
        """Why workers would refuse an epoch, for those who would. Raises ControlError."""
        need = self._facts.buffers_of(config, len(workers))
        answers = await asyncio.gather(
            *(
                self._reach.agent_of(worker).check_epoch(config.ep_level, need, ANSWER_TIMEOUT_S)
                for worker in workers
            )
        )
        return {worker.worker_id: why for worker, why in zip(workers, answers, strict=True) if why}

    async def _get_ready(self, attempt: EpochAttempt) -> None:
        if self._state.loaded is None:
            raise ControlError("the router's engine has not loaded")
        await attempt.get_ready(self._state.loaded)

    def _begin(self, attempt: EpochAttempt) -> None:
        """The next step's header commits an epoch."""
        self._members, self._seating, self._survivors_failed = attempt.members, attempt.seating, False
        for worker, rank in zip(attempt.members, attempt.seating.ranks, strict=True):
            self._holders[worker.worker_id] = worker, rank
        for worker, transport in zip(attempt.members, attempt.transports, strict=False):
            if worker.transport != transport:
                logger.info("rows of expert worker %s travel by %s", worker.worker_id, transport)
            worker.transport = transport
        for worker in attempt.members:
            worker.state = SERVING
        self._state.epoch_begun(attempt.epoch)
        logger.info("epoch %d is ready: %s", attempt.epoch, attempt.names)

    def _give_up(self, reason: str, tell_engine: bool) -> None:
        """End the epoch in force, or the attempt at one, and what is prepared beside it."""
        for attempt in self._attempts:
            attempt.fail(reason)
        if self._state.is_linked:
            if tell_engine:
                self._reach.send(Disconnect(self._state.epoch, reason))
            self._state.epoch_over(reason)
        self._members, self._seating = [], None
