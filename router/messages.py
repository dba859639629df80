"""What the router's front and its engine say to each other. Torch-free; carried by common.channel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.channel import Fatal, Shutdown, by_name

# ---------------------------------------------------------------- front -> engine


@dataclass(frozen=True, slots=True)
class Tune:
    """Can the next steps be run like this? Answered by Tuned or TuneRefused. CommitTune does it.

    Attributes:
        tune_id: what the answer and CommitTune call it; a later Tune takes the place of this one.
        ep_level: 1 AllGather, 2 AllToAll.
        micro_batches: parts a step is cut into; one computes here while the rows of another are away.
        chunk_rows: most rows of one message at ep_level 2; 0 does not cut.
        buffer_factors: [[tokens, factor], ...], see common.row_limits.
        cutoff_factor: topk_scaling_factor where the cutoff is on, else None.
        cutoff_min_rows: the cutoff never bounds fewer rows.
        is_grouped: whether workers may run all their experts in one fused call.
        max_batch_size: most sequences that run at a time.
        max_prefill_tokens: most tokens of prompts in one step.
        deadline_floor_s: shortest time an expert worker is given to answer.
    """

    tune_id: int
    ep_level: int
    micro_batches: int
    chunk_rows: int
    buffer_factors: list[list[float]]
    cutoff_factor: float | None
    cutoff_min_rows: int
    is_grouped: bool
    max_batch_size: int
    max_prefill_tokens: int
    deadline_floor_s: float


@dataclass(frozen=True, slots=True)
class Configure:
    """The first message: everything the engine is started with.

    Attributes:
        kv_cache_bytes: budget of the latent cache.
        block_size: tokens per KV block.
        max_seq_len: most tokens of prompt and answer; None takes what the checkpoint and the cache allow.
        threads: torch threads; None leaves torch's default.
        tune: the fields of the Tune that holds from the first step on.
        data_address: address on which links to expert workers are agreed on.
        exchange: how rows reach expert workers, "links" or "collective".
        same_host_transport: of links, "auto", "sharedMemory" or "links".
        experts_in_process: keep the routed experts in this process (loopback) instead of on expert workers.
        trace_file: where the timeline of the first steps is written, or None.
    """

    model_path: str
    dtype: str
    device: str
    threads: int | None
    kv_cache_bytes: int
    block_size: int
    max_seq_len: int | None
    tune: dict[str, Any]
    term: int
    data_address: str
    exchange: str
    same_host_transport: str
    experts_in_process: bool
    trace_file: str | None


@dataclass(frozen=True, slots=True)
class Connect:
    """Join the links of an epoch, beside the running ones. Answered by Linked or LinkFailed.

    Attributes:
        waits_for_commit: hold the epoch until CommitTune or TakeUp; else the next step's header commits it.
        members: one per ep_rank: {"ep_rank", "worker" (its name), "incarnation", "prefix" (of the link)}
        layers: [[layer_id, [experts of ep_rank 0], [experts of ep_rank 1], ...], ...].
        timeout_s: how long to wait for each worker at its link's address.
    """

    epoch: int
    members: list[dict[str, int | str]]
    layers: list[list[int | list[int]]]
    timeout_s: float
    waits_for_commit: bool = False


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop the links of an epoch: a member is gone. Where it is in force, requests wait for the next."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Take in one request.

    Attributes:
        stop_token_ids: tokens that end the answer, with the model's own unless those are to be ignored.
        max_tokens: most tokens to generate, already bounded by max_seq_len.
        logprobs: alternatives per token, 0 for the chosen token alone, None for no log-probabilities.
        generated: tokens of the answer that an earlier engine has given; they count as if this one had.
    """

    request_id: str
    prompt: list[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    logprobs: int | None
    generated: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CommitTune:
    """From the next step on, run steps as the Tune of this id said. What a step is doing is not disturbed.

    Attributes:
        epoch: the one that is held for this, which the same step commits; 0: the epoch in force goes on.
    """

    tune_id: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class TakeUp:
    """From the next step on, the epoch that is held. What a step is doing is not disturbed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request and free its blocks at the next step. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AskLoads:
    """How often was each expert chosen? Answered by Loads."""

    ask_id: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Answers AskProgress: `progress` differs from the last one if the worker moved; None: not reachable."""

    ask_id: int
    progress: int | None


# ---------------------------------------------------------------- engine -> front


@dataclass(frozen=True, slots=True)
class Loading:
    """Some of the router's weights were read."""

    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is ready for Connect (or, with the experts in its process, for Submit).

    Attributes:
        store_host, store_port: where expert workers agree on their links.
        int8_layers: the layers whose rows leave in int8 at ep_level 2.
    """

    loaded_bytes: int
    kv_blocks: int
    block_size: int
    max_seq_len: int
    store_host: str
    store_port: int
    int8_layers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Linked:
    """All links of the epoch are up; the next step's header commits it, unless it is held.

    Attributes:
        transports: per ep_rank, what carries its rows, and why.
    """

    epoch: int
    transports: list[str]


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """A link of the epoch could not be made. The running epoch is untouched."""

    epoch: int
    ep_rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """The next steps can be run as asked; nothing has changed yet."""

    tune_id: int


@dataclass(frozen=True, slots=True)
class TuneRefused:
    """The next steps cannot be run as asked; nothing changes."""

    tune_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one step.

    Attributes:
        events: one dict per sequence: "id" (request_id), "token", "fin" (None, "stop" or "length"), and,
            where log-probabilities were asked for, "logprob" and "top" ([[token_id, logprob], ...], likeliest
            first).
    """

    events: list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class Lost:
    """An expert worker was lost, the epoch is over. Requests wait for the next, which runs the step again.

    Attributes:
        ep_rank: the worker that was lost, or -1 where the front said so itself (Disconnect).
    """

    epoch: int
    ep_rank: int
    message: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """One request cannot be run, now or ever. The engine goes on."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class AskProgress:
    """An expert worker is overdue: has it moved? Answered by Progress."""

    ask_id: int
    ep_rank: int


@dataclass(frozen=True, slots=True)
class Loads:
    """Answers AskLoads. `layers`: [[layer_id, [choices of expert 0, choices of expert 1, ...]], ...]."""

    ask_id: int
    layers: list[list[int | list[int]]]


@dataclass(frozen=True, slots=True)
class Stats:
    """Sent after a step, at most ten times a second, after an epoch's first, and when the engine is idle.

    Attributes:
        epoch: a step of it has settled, or there is none to run; 0: none is in force.
        replayed_steps: steps that were run again after a loss and have settled, since the engine started.
        extra_rounds, extra_passes: of the exchange in force, see common.exchange.Extra.
        workers: per ep_rank [receive_s, compute_s, reply_s] of the last step.
    """

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    num_steps: int
    epoch: int
    extra_rounds: int = 0
    extra_passes: int = 0
    workers: list[list[float]] = field(default_factory=list)
    replayed_steps: int = 0


TO_ENGINE = by_name(
    Configure, Connect, Disconnect, Submit, Tune, CommitTune, TakeUp, Abort, AskLoads, Progress, Shutdown
)
TO_FRONT = by_name(
    *(
        Loading,
        Loaded,
        Linked,
        LinkFailed,
        Tokens,
        Lost,
        Rejected,
        AskProgress,
        Loads,
        Stats,
        Tuned,
        TuneRefused,
    ),
    Fatal,
)
