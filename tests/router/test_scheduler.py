"""What each step computes: every request is answered, within bounds, whatever the limits. No tensors."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, RequestError
from router.plan import Plan
from router.scheduler import Limits, Scheduler
from router.sequence import Sequence

STOP = 3
ROOMY = Limits(num_blocks=1000, block_size=4, max_batch_size=64, max_prefill_tokens=4096, max_seq_len=4000)


def next_token(sequence: Sequence) -> int:
    """Stands for model and sampler: a function of the tokens alone."""
    return hash(tuple(sequence.tokens)) % 17


def request(
    request_id: str, num_prompt_tokens: int, max_tokens: int = 4, stop: frozenset[int] = frozenset()
) -> Sequence:
    prompt = [crc32(f"{request_id} {i}".encode()) % 17 for i in range(num_prompt_tokens)]
    return Sequence(request_id, prompt, num_prompt_tokens, max_tokens, stop_token_ids=stop)


def settle(scheduler: Scheduler, plan: Plan) -> dict[str, tuple[int, str | None]]:
    settled = scheduler.settle(plan, [next_token(sequence) for sequence in plan.sampled])
    return {s.sequence.request_id: (s.token_id, s.finish_reason) for s in settled}


def stepped(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    settle(scheduler, plan)
    return plan


def expected_answer(sequence: Sequence, max_seq_len: int) -> tuple[list[int], str]:
    """What a sequence alone on an endless machine answers."""
    alone = replace(sequence, tokens=list(sequence.tokens), block_table=[])
    while True:
        alone.tokens.append(next_token(alone))
        if alone.tokens[-1] in alone.stop_token_ids:
            return alone.tokens[alone.num_prompt_tokens :], "stop"
        if alone.num_generated >= alone.max_tokens or len(alone.tokens) >= max_seq_len:
            return alone.tokens[alone.num_prompt_tokens :], "length"


def check_plan(plan: Plan, limits: Limits, scheduler: Scheduler, computed: dict[str, int]) -> None:
    """A plan is within its bounds, continues what is in the cache, and no two sequences share a block."""
    sequences = [chunk.sequence for chunk in plan.chunks]
    assert len({s.request_id for s in sequences}) == len(sequences) <= limits.max_batch_size
    assert scheduler.num_running <= limits.max_batch_size
    blocks = [block for s in sequences for block in s.block_table]
    assert len(set(blocks)) == len(blocks) <= scheduler.num_blocks_used <= limits.num_blocks
    prefill = sum(chunk.num_tokens for chunk in plan.chunks if chunk.num_tokens > 1)
    assert prefill <= limits.max_prefill_tokens
    assert plan.num_tokens <= limits.max_prefill_tokens + limits.max_batch_size
    for chunk in plan.chunks:
        assert chunk.num_tokens >= 1
        assert chunk.start == chunk.sequence.num_computed
        assert chunk.start in (0, computed.get(chunk.sequence.request_id, 0))
        assert chunk.samples == (chunk.end == len(chunk.sequence.tokens))
        assert len(chunk.sequence.block_table) * limits.block_size >= chunk.end


all_limits = st.builds(
    Limits,
    num_blocks=st.integers(4, 30),
    block_size=st.sampled_from([1, 2, 4, 16]),
    max_batch_size=st.integers(1, 6),
    max_prefill_tokens=st.integers(1, 40),
    max_seq_len=st.just(0),
).flatmap(
    lambda limits: st.integers(2, limits.num_blocks * limits.block_size).map(
        lambda max_seq_len: replace(limits, max_seq_len=max_seq_len)
    )
)


@settings(max_examples=300, deadline=None)
@given(limits=all_limits, data=st.data())
def test_every_sequence_gets_the_answer_it_would_get_alone_whatever_the_limits(
    limits: Limits, data: st.DataObject
) -> None:
    scheduler = Scheduler(limits)
    sizes = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 30),
                st.integers(1, limits.max_seq_len - 1),
                st.integers(1, 30),
                st.integers(0, 40),
            ),
            min_size=1,
            max_size=8,
        )
    )
    stop = frozenset({STOP}) if data.draw(st.booleans()) else frozenset()
    arrivals = {
        f"r{i}": (arrival, request(f"r{i}", n, m, stop)) for i, (arrival, n, m, _) in enumerate(sizes)
    }
    aborts = {f"r{i}": abort for i, (_, _, _, abort) in enumerate(sizes) if abort < 10}
    expected = {
        name: expected_answer(sequence, limits.max_seq_len) for name, (_, sequence) in arrivals.items()
    }
    answers: dict[str, list[int]] = {name: [] for name in arrivals}
    reasons: dict[str, str] = {}
    computed: dict[str, int] = {}
    aborted: set[str] = set()

    # The oldest sequence is never preempted and gets a chunk in every step, so this many steps are enough.
    num_steps = 60 + sum(len(sequence.tokens) + sequence.max_tokens for _, sequence in arrivals.values())
    for step_id in range(num_steps):
        for name, (arrival, sequence) in arrivals.items():
            if arrival == step_id:
                scheduler.submit(sequence)
            if aborts.get(name) == step_id and scheduler.abort(name):
                aborted.add(name)
        plan = scheduler.schedule()
        assert bool(plan.chunks) == scheduler.has_work
        check_plan(plan, limits, scheduler, computed)
        for name, (token_id, reason) in settle(scheduler, plan).items():
            answers[name].append(token_id)
            if reason is not None:
                reasons[name] = reason
        computed = {chunk.sequence.request_id: chunk.end for chunk in plan.chunks}

    assert not scheduler.has_work
    assert scheduler.num_blocks_used == 0
    for name in arrivals:
        if name in aborted:
            assert answers[name] == expected[name][0][: len(answers[name])]
        else:
            assert (answers[name], reasons[name]) == expected[name]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), st.integers(1, 3))
def test_first_tokens_come_in_the_order_of_arrival(prompts: list[int], max_batch_size: int) -> None:
    limits = Limits(
        num_blocks=12, block_size=4, max_batch_size=max_batch_size, max_prefill_tokens=8, max_seq_len=48
    )
    scheduler = Scheduler(limits)
    for i, num_prompt_tokens in enumerate(prompts):
        scheduler.submit(request(f"r{i}", num_prompt_tokens))
    first: list[str] = []
    while scheduler.has_work:
        first += [name for name in settle(scheduler, scheduler.schedule()) if name not in first]
    assert first == [f"r{i}" for i in range(len(prompts))]


def test_a_step_computes_every_decoding_sequence_and_prompts_up_to_the_limit() -> None:
    scheduler = Scheduler(replace(ROOMY, max_prefill_tokens=10))
    for i in range(3):
        scheduler.submit(request(f"short{i}", 2, max_tokens=50))
    settle(scheduler, scheduler.schedule())
    scheduler.submit(request("long", 25))
    chunks = [[(c.num_tokens, c.samples) for c in stepped(scheduler).chunks] for _ in range(4)]
    assert chunks == [
        [(1, True)] * 3 + [(10, False)],
        [(1, True)] * 3 + [(10, False)],
        [(1, True)] * 3 + [(5, True)],
        [(1, True)] * 4,
    ]


def test_the_youngest_gives_way_and_its_answer_is_replayed_without_a_second_token_event() -> None:
    limits = Limits(num_blocks=4, block_size=4, max_batch_size=2, max_prefill_tokens=64, max_seq_len=16)
    scheduler = Scheduler(limits)
    old, young = request("old", 4, max_tokens=8), request("young", 4, max_tokens=8)
    scheduler.submit(old)
    scheduler.submit(young)
    events: list[str] = []
    while scheduler.num_preemptions == 0:
        plan = scheduler.schedule()
        events += settle(scheduler, plan)
    assert [chunk.sequence for chunk in plan.chunks] == [old]
    assert young.block_table == []
    assert young.num_computed == 0
    assert young.num_generated > 0
    generated = young.num_generated
    replay = None
    while replay is None:
        plan = scheduler.schedule()
        events += settle(scheduler, plan)
        replay = next((chunk for chunk in plan.chunks if chunk.sequence is young), None)
    assert (replay.start, replay.num_tokens, replay.samples) == (0, 4 + generated, True)
    while scheduler.has_work:
        events += settle(scheduler, scheduler.schedule())
    assert events.count("young") == events.count("old") == 8


def test_a_sequence_may_fill_the_whole_cache() -> None:
    limits = Limits(num_blocks=3, block_size=2, max_batch_size=4, max_prefill_tokens=64, max_seq_len=6)
    scheduler = Scheduler(limits)
    sequence = request("r", 5, max_tokens=100)
    scheduler.submit(sequence)
    assert settle(scheduler, scheduler.schedule())["r"][1] == "length"
    assert len(sequence.tokens) == 6


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "message"),
    [(0, 1, "prompt is empty"), (4000, 1, "no room for an answer within 4000"), (5, 0, "max_tokens is 0")],
)
def test_what_can_never_run_is_refused(num_prompt_tokens: int, max_tokens: int, message: str) -> None:
    scheduler = Scheduler(ROOMY)
    with pytest.raises(RequestError, match=message):
        scheduler.submit(request("r", num_prompt_tokens, max_tokens))
    assert not scheduler.has_work


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    scheduler = Scheduler(ROOMY)
    scheduler.submit(request("r", 3))
    with pytest.raises(RequestError, match="in use"):
        scheduler.submit(request("r", 4))
    assert scheduler.abort("r")
    scheduler.submit(request("r", 4))


def test_an_abort_frees_blocks_of_the_running_and_forgets_the_waiting() -> None:
    scheduler = Scheduler(replace(ROOMY, max_batch_size=1))
    scheduler.submit(request("running", 9))
    scheduler.submit(request("waiting", 9))
    settle(scheduler, scheduler.schedule())
    assert scheduler.num_blocks_used == 3
    assert scheduler.abort("waiting")
    assert scheduler.abort("running")
    assert not scheduler.abort("unknown")
    assert scheduler.num_blocks_used == 0
    assert not scheduler.has_work


def test_a_plan_that_did_not_settle_is_planned_again_whatever_came_and_whatever_the_limits_are() -> None:
    scheduler = Scheduler(replace(ROOMY, max_batch_size=2))
    for i in range(3):
        scheduler.submit(request(f"r{i}", 9))
    plan = scheduler.schedule()
    scheduler.submit(request("late", 9))
    scheduler.limits = replace(ROOMY, max_batch_size=1, max_prefill_tokens=1)
    assert (scheduler.schedule(), scheduler.is_unsettled) == (plan, True)
    settle(scheduler, plan)
    assert not scheduler.is_unsettled
    assert scheduler.schedule() != plan


def test_a_sequence_that_is_aborted_leaves_the_plan_that_did_not_settle() -> None:
    scheduler = Scheduler(ROOMY)
    for name in "abc":
        scheduler.submit(request(name, 9))
    first, _, last = scheduler.schedule().chunks
    assert scheduler.abort("b")
    assert scheduler.schedule().chunks == (first, last)
    assert scheduler.abort("a")
    assert scheduler.abort("c")
    assert not scheduler.has_work
    assert scheduler.num_blocks_used == 0
    scheduler.submit(request("b", 9))
    (again,) = scheduler.schedule().chunks
    assert again.sequence.block_table


@pytest.mark.parametrize("change", [{"max_seq_len": 4001}, {"max_batch_size": 0}, {"max_prefill_tokens": 0}])
def test_limits_that_cannot_work_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"at least 1|do not fit"):
        Scheduler(replace(ROOMY, **change))


@pytest.mark.parametrize(("num_prompt_tokens", "is_admitted"), [(7, True), (8, False)])
def test_a_prompt_waits_until_its_first_new_token_has_room_too(
    num_prompt_tokens: int, is_admitted: bool
) -> None:
    limits = Limits(num_blocks=4, block_size=4, max_batch_size=4, max_prefill_tokens=64, max_seq_len=16)
    scheduler = Scheduler(limits)
    scheduler.submit(request("first", 6))
    scheduler.submit(request("second", num_prompt_tokens))
    assert len(scheduler.schedule().chunks) == 1 + is_admitted
