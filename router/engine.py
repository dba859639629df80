"""The engine: one step after another, for all running sequences. The only thread that touches tensors.

A step is a transaction: until it settles, nothing of it is visible to a client. One in which an expert worker
was lost is computed again, as it was planned, with the workers of the next epoch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common import compute_threads
from common.errors import ControlError, RequestError, WorkerLost
from common.exchange import Extra, RouterExchange, RowOrigins, StepHeader
from common.row_limits import RowLimits
from router.batch import Batch, build_batch
from router.expert_load import CountedExchange, ExpertLoads
from router.messages import AskLoads, Loads, Lost, Rejected, Stats, Submit, Tokens, Tune, Tuned, TuneRefused
from router.model.latent_cache import LatentCache
from router.plan import Plan
from router.sampler import Draw, sample
from router.scheduler import Scheduler, Settled
from router.sequence import Sampling, Sequence
from router.tuning import problem_of

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.1
"""Shortest time between two Stats while steps run."""


@dataclass(frozen=True, slots=True)
class Membership:
    """The expert workers of an epoch, as the engine sees them.

    Attributes:
        ep_size: how many there are.
        step_times: per ep_rank [receive_s, compute_s, reply_s] of the last step.
        set_deadline_floor: give the workers another shortest time to answer from the next rows on.
        transports: per ep_rank, what carries its rows, and why.
        waits_for_commit: it is held until it is to be taken up.
    """

    epoch: int
    exchange: RouterExchange
    ep_size: int
    step_times: Callable[[], list[list[float]]]
    set_deadline_floor: Callable[[float], None]
    transports: tuple[str, ...] = ()
    waits_for_commit: bool = False


class Engine:
    """Runs steps over the sequences of a scheduler. Everything it has to say goes to `send`."""

    def __init__(  # noqa: PLR0913 - what an engine is made of, each part named
        self,
        model: Callable[[list[Batch], LatentCache, RouterExchange], Tensor],
        cache: LatentCache,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        device: torch.device,
        term: int,
        num_experts_per_tok: int,
        tune: Tune,
        loads: ExpertLoads,
        send: Callable[[object], None],
    ) -> None:
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._device = device
        self._term = term
        self._num_experts_per_tok = num_experts_per_tok
        self._tune = tune
        self._loads = loads
        self._send = send
        self._proposed: Tune | None = None
        self._deadline_floor_s: float | None = None
        self._membership: Membership | None = None
        self._held: Membership | None = None
        self._last_loss = (-1, "no such epoch is held")
        self._epoch = 0
        self._step_id = 0
        self._replayed_steps = 0
        self._stats_at = 0.0
        self._is_reported = False

    @property
    def epoch(self) -> int:
        """The epoch in force, or the last one that was."""
        return self._epoch

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return self._membership is not None and self._scheduler.has_work

    def adopt(self, membership: Membership) -> None:
        """Take the next step with these expert workers; its header commits their epoch."""
        self._let_go_of_held()
        previous, self._membership = self._membership, membership
        self._epoch = membership.epoch
        if self._deadline_floor_s is not None:
            membership.set_deadline_floor(self._deadline_floor_s)
        # The front waits to hear that the first step has settled.
        self._is_reported, self._stats_at = False, 0.0
        if previous is not None:
            previous.exchange.close()

    def hold(self, membership: Membership) -> None:
        """Have an epoch ready to be taken up, while the one in force goes on."""
        self._let_go_of_held()
        self._held = membership

    def submit(self, message: Submit) -> None:
        """Queue a request; one that can never run is answered at once."""
        self._is_reported = False
        try:
            self._scheduler.submit(self._sequence(message))
        except RequestError as error:
            self._send(Rejected(message.request_id, str(error)))

    def tune(self, message: Tune) -> None:
        """Say whether the next steps can be run in another way. Nothing changes before `commit`."""
        reason = problem_of(message)
        self._proposed = None if reason else message
        self._send(TuneRefused(message.tune_id, reason) if reason else Tuned(message.tune_id))

    def commit(self, tune_id: int, epoch: int = 0) -> None:
        """Run steps as the last Tune said, from the next one on, with the epoch that is held for it.

        Args:
            tune_id: of the Tune.
            epoch: of what is held; 0: the epoch in force goes on.

        Raises:
            ControlError: that is not what was agreed to.
        """
        tune, self._proposed = self._proposed, None
        if tune is None or tune.tune_id != tune_id:
            raise ControlError(f"CommitTune {tune_id} follows no Tune of this id that was agreed to")
        self._tune = tune
        self._scheduler.limits = replace(
            self._scheduler.limits,
            max_batch_size=tune.max_batch_size,
            max_prefill_tokens=tune.max_prefill_tokens,
        )
        self._deadline_floor_s = tune.deadline_floor_s
        if epoch != 0:
            self.take_up(epoch)
        elif self._membership is not None:
            self._membership.set_deadline_floor(tune.deadline_floor_s)

    def take_up(self, epoch: int) -> None:
        """Go on with the epoch that is held.

        The front may have learnt of a loss only after it had said this: it is told again, of this epoch.
        """
        held = self._held
        if held is not None and held.epoch == epoch:
            self._held = None
            self.adopt(held)
        else:
            self._epoch = epoch
            self._lose(*self._last_loss)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks."""
        if self._scheduler.abort(request_id):
            self._is_reported = False

    def disconnect(self, epoch: int, reason: str) -> None:
        """Give up the epoch in force, or one that is held; any other is ignored."""
        if self._held is not None and self._held.epoch == epoch:
            self._let_go_of_held()
        elif self._membership is not None and self._membership.epoch == epoch:
            self._lose(-1, reason)

    def close(self) -> None:
        """Drop the links to the expert workers."""
        self._let_go_of_held()
        if self._membership is not None:
            self._membership.exchange.close()
            self._membership = None

    def step(self) -> None:
        """Compute one token of every sequence that decodes, and parts of prompts; or what failed, again."""
        membership = self._membership
        if membership is None or not self._scheduler.has_work:
            return
        is_replay = self._scheduler.is_unsettled
        plan = self._scheduler.schedule()
        try:
            logits = self._compute(plan, membership)
        except WorkerLost as lost:
            logger.warning("step %d of epoch %d failed: %s", self._step_id, membership.epoch, lost)
            self._lose(lost.ep_rank, str(lost))
            return
        self._loads.settle()
        self._replayed_steps += is_replay
        draws = sample(logits, plan.sampled)
        # A row without an answer still takes its place; the sequence ends before anybody sees the token.
        settled = self._scheduler.settle(plan, [0 if draw is None else draw.token_id for draw in draws])
        self._report_tokens(settled, draws)
        self._is_reported = False
        if time.monotonic() - self._stats_at >= STATS_INTERVAL_S:
            self.report()

    def report_loads(self, message: AskLoads) -> None:
        """Send how often each expert was chosen."""
        layers = self._loads.layers()
        self._send(Loads(message.ask_id, [[layer_id, counts] for layer_id, counts in layers.items()]))

    def report(self) -> None:
        """Send Stats, unless nothing happened since the last."""
        if self._is_reported:
            return
        self._is_reported = True
        self._stats_at = time.monotonic()
        membership = self._membership
        extra = membership.exchange.extra if membership is not None else Extra()
        self._send(
            Stats(
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                kv_blocks_used=self._scheduler.num_blocks_used,
                num_steps=self._step_id,
                epoch=self._epoch if membership is not None else 0,
                extra_rounds=extra.rounds,
                extra_passes=extra.passes,
                workers=membership.step_times() if membership is not None else [],
                replayed_steps=self._replayed_steps,
            )
        )

    def _compute(self, plan: Plan, membership: Membership) -> Tensor:
        """Logits [B, V] of the sequences of the plan that sample."""
        self._step_id += 1
        parts = plan.split(self._tune.micro_batches)
        block_size = self._scheduler.limits.block_size
        batches = [build_batch(part, block_size, self._device, number) for number, part in enumerate(parts)]
        header = self._header(membership, parts)
        origins = [RowOrigins(batch.request_keys, batch.positions) for batch in batches]
        exchange = CountedExchange(membership.exchange, self._loads)
        exchange.begin(header, origins)
        compute_threads.fit_torch(header.num_tokens)
        return self._model(batches, self._cache, exchange)

    def _header(self, membership: Membership, parts: tuple[Plan, ...]) -> StepHeader:
        tune = self._tune
        num_tokens = max(part.num_tokens for part in parts)
        limits = RowLimits(
            self._num_experts_per_tok,
            membership.ep_size,
            tuple((int(tokens), factor) for tokens, factor in tune.buffer_factors),
            tune.cutoff_factor,
            tune.cutoff_min_rows,
        )
        return StepHeader(
            self._term,
            membership.epoch,
            self._step_id,
            tune.ep_level,
            num_tokens,
            micro_batches=len(parts),
            round_rows=limits.round_rows(num_tokens),
            chunk_rows=tune.chunk_rows,
            pass_rows=limits.pass_rows(num_tokens),
            is_grouped=tune.is_grouped,
        )

    def _report_tokens(self, settled: list[Settled], draws: list[Draw | None]) -> None:
        events = []
        for token, draw in zip(settled, draws, strict=True):
            if draw is None:
                self._reject_unanswerable(token.sequence)
                continue
            event: dict[str, object] = {
                "id": token.sequence.request_id,
                "token": token.token_id,
                "fin": token.finish_reason,
            }
            if draw.logprob is not None:
                event["logprob"] = draw.logprob
                event["top"] = [list(alternative) for alternative in draw.top]
            events.append(event)
        if events:
            self._send(Tokens(events))

    def _reject_unanswerable(self, sequence: Sequence) -> None:
        position = len(sequence.tokens) - 1
        self._scheduler.abort(sequence.request_id)
        logger.error("logits of request %s at position %d are not finite", sequence.request_id, position)
        self._send(
            Rejected(
                sequence.request_id,
                f"the model's logits at position {position} are not finite, so that no token can be drawn: "
                "check the checkpoint and its dtype",
            )
        )

    def _lose(self, ep_rank: int, reason: str) -> None:
        """End the epoch: its links are dropped, so that nothing of it arrives any more. All else stays."""
        self.close()
        self._is_reported = False
        self._last_loss = (ep_rank, reason)
        self._send(Lost(self._epoch, ep_rank, reason))

    def _let_go_of_held(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.exchange.close()

    def _sequence(self, message: Submit) -> Sequence:
        tokens = [*message.prompt, *message.generated]
        for token_id in tokens:
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    "prompt",
                    f"token id {token_id} is not in the vocabulary: it must be below {self._vocab_size}",
                )
        return Sequence(
            request_id=message.request_id,
            tokens=tokens,
            num_prompt_tokens=len(message.prompt),
            max_tokens=message.max_tokens,
            sampling=Sampling(
                message.temperature, message.top_k, message.top_p, message.seed, message.logprobs
            ),
            stop_token_ids=frozenset(message.stop_token_ids),
        )
