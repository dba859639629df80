"""The engine as the front sees it: a real process on a real channel, with the experts in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.channel import Fatal, Shutdown
from router.messages import (
    Abort,
    Connect,
    LinkFailed,
    Loaded,
    Rejected,
    Stats,
    Submit,
    Tokens,
)
from router.scheduler import Limits, Scheduler
from router.sequence import Sequence
from tests.router.engine_child import EngineChild, configure, engine, engine_process
from tests.tiny_checkpoint import write_checkpoint

VOCAB = 256
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 8192, "torch_dtype": "float32"}
BYTES_PER_BLOCK = 16 * 4 * (32 + 16) * 4
"""Tokens of a block, layers, latent and rotated key, bytes of a float32."""


def request(request_id: str, num_prompt_tokens: int, **overrides: Any) -> Submit:
    """A request for 24 greedy tokens with logprobs; the prompt is a function of its length."""
    fields: dict[str, Any] = {
        "request_id": request_id,
        "prompt": [(7 * i * i + 3 * num_prompt_tokens) % VOCAB for i in range(num_prompt_tokens)],
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "max_tokens": 24,
        "stop_token_ids": [],
        "logprobs": 2,
    }
    return Submit(**fields | overrides)


def mixed_requests() -> list[Submit]:
    """Short and long, greedy and sampled, with and without logprobs."""
    return [
        request("a", 3),
        request("b", 40, temperature=0.9, seed=5, top_p=0.9),
        request("c", 70, max_tokens=40),
        request("d", 1, temperature=1.5, seed=6, top_k=20, logprobs=0),
        request("e", 17, logprobs=None),
        request("f", 33, max_tokens=30),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, family="v3", **SMALL)
    return directory


@pytest.fixture(scope="module")
def roomy(checkpoint: Path) -> Iterator[EngineChild]:
    with engine(checkpoint) as (child, _):
        yield child


def test_a_request_alone_and_in_a_mixed_batch_gets_the_same_bits(roomy: EngineChild) -> None:
    alone = {one.request_id: roomy.answer([one])[one.request_id] for one in mixed_requests()}
    assert roomy.answer(mixed_requests()) == alone
    assert [len(alone[name].tokens) for name in "abcdef"] == [24, 24, 40, 24, 24, 30]
    assert all(answer.finish_reason == "length" for answer in alone.values())


@pytest.mark.parametrize("max_prefill_tokens", [5, 64])
def test_a_cache_too_small_for_the_batch_and_small_chunks_change_no_bit(
    checkpoint: Path, roomy: EngineChild, max_prefill_tokens: int
) -> None:
    num_blocks = 9
    assert num_preemptions(num_blocks, max_prefill_tokens) >= 2
    expected = roomy.answer(mixed_requests())
    cache = num_blocks * BYTES_PER_BLOCK
    with engine(checkpoint, kv_cache_bytes=cache, max_prefill_tokens=max_prefill_tokens) as (tight, loaded):
        assert loaded.kv_blocks == num_blocks
        assert tight.answer(mixed_requests()) == expected
        assert tight.idle().kv_blocks_used == 0


def test_preemption_changes_no_bit_of_a_v2_model_in_bfloat16_either(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v2", **SMALL)
    with engine(tmp_path, dtype="bfloat16") as (child, _):
        expected = child.answer(mixed_requests())
    tight = {"kv_cache_bytes": 9 * BYTES_PER_BLOCK // 2, "max_prefill_tokens": 7}
    with engine(tmp_path, dtype="bfloat16", **tight) as (child, loaded):
        assert loaded.kv_blocks == 9
        assert child.answer(mixed_requests()) == expected


def num_preemptions(num_blocks: int, max_prefill_tokens: int) -> int:
    """How often the mixed requests get in each other's way."""
    scheduler = Scheduler(Limits(num_blocks, 16, 8, max_prefill_tokens, num_blocks * 16))
    for one in mixed_requests():
        scheduler.submit(Sequence(one.request_id, list(one.prompt), len(one.prompt), one.max_tokens))
    while scheduler.has_work:
        plan = scheduler.schedule()
        scheduler.settle(plan, [0] * len(plan.sampled))
    return scheduler.num_preemptions


def test_a_sampled_answer_is_reproduced_by_its_seed_and_changed_by_another(roomy: EngineChild) -> None:
    first = roomy.answer([request("a", 9, temperature=1.0, seed=1)])["a"]
    again = roomy.answer([request("b", 9, temperature=1.0, seed=1), request("c", 5)])["b"]
    other = roomy.answer([request("a", 9, temperature=1.0, seed=2)])["a"]
    assert first == again
    assert first.tokens != other.tokens


def test_an_answer_continued_from_a_longer_prompt_draws_the_same_tokens(roomy: EngineChild) -> None:
    whole = roomy.answer([request("a", 9, temperature=1.0, seed=1, logprobs=None)])["a"]
    prompt = [*request("a", 9).prompt, *whole.tokens[:10]]
    rest = roomy.answer(
        [request("a", 9, prompt=prompt, temperature=1.0, seed=1, logprobs=None, max_tokens=14)]
    )["a"]
    # The prompt takes another path through attention: logits are close, not equal, and the noise is the same.
    assert rest.tokens[:4] == whole.tokens[10:14]


def test_a_stop_token_ends_the_answer_with_that_token(roomy: EngineChild) -> None:
    tokens = roomy.answer([request("a", 20)])["a"].tokens
    stopped = roomy.answer([request("a", 20, stop_token_ids=[tokens[5]])])["a"]
    assert stopped.tokens == tokens[: tokens.index(tokens[5]) + 1]
    assert stopped.finish_reason == "stop"


def test_an_abort_frees_the_blocks_and_leaves_the_others_alone(roomy: EngineChild) -> None:
    expected = roomy.answer([request("b", 12)])["b"]
    roomy.idle()
    roomy.send(request("a", 50, max_tokens=5000))
    roomy.until(Tokens)
    assert roomy.until(Stats, lambda stats: stats.num_running == 1).kv_blocks_used >= 4
    roomy.send(Abort("a"), Abort("unknown"))
    assert roomy.idle().kv_blocks_used == 0
    assert roomy.answer([request("b", 12)])["b"] == expected


def test_what_cannot_be_run_is_rejected_and_the_engine_goes_on(roomy: EngineChild) -> None:
    answers = roomy.answer(
        [
            request("a", 3, prompt=[1, 1 << 30]),
            request("b", 3, prompt=[]),
            request("c", 100_000),
            request("d", 4),
        ]
    )
    assert "token id 1073741824 is not in the vocabulary" in str(answers["a"].error)
    assert "prompt is empty" in str(answers["b"].error)
    assert "no room for an answer" in str(answers["c"].error)
    assert answers["d"].error is None


def test_an_engine_with_its_own_experts_refuses_to_connect(roomy: EngineChild) -> None:
    roomy.send(Connect(2, [], [], 1.0))
    assert roomy.until(LinkFailed).epoch == 2


def test_an_idle_engine_burns_no_cpu_and_is_silent(roomy: EngineChild) -> None:
    roomy.answer([request("a", 3)])
    roomy.idle()
    process = psutil.Process(roomy.process.pid)
    before = sum(process.cpu_times()[:2])
    time.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.02
    assert roomy._arrived.empty()


def test_stats_come_at_most_ten_times_a_second(roomy: EngineChild) -> None:
    roomy.idle() if roomy._arrived.qsize() else None
    num_seen, start = len(roomy.seen), time.monotonic()
    roomy.answer([request(name, 30, max_tokens=60) for name in "abcd"])
    elapsed = time.monotonic() - start
    num_stats = sum(isinstance(message, Stats) for message in roomy.seen[num_seen:])
    assert 1 <= num_stats <= elapsed / 0.1 + 2


def test_the_longest_sequence_is_what_checkpoint_and_cache_allow(checkpoint: Path) -> None:
    with engine(checkpoint, kv_cache_bytes=3 * BYTES_PER_BLOCK, max_seq_len=100_000) as (child, loaded):
        assert (loaded.kv_blocks, loaded.max_seq_len) == (3, 48)
        answer = child.answer([request("a", 40, max_tokens=100)])["a"]
        assert (len(answer.tokens), answer.finish_reason) == (8, "length")


def test_no_more_blocks_are_taken_than_full_batches_use(checkpoint: Path) -> None:
    with engine(checkpoint, max_seq_len=32, max_batch_size=3, kv_cache_bytes=64 << 20) as (_, loaded):
        assert loaded.kv_blocks == 6


def test_without_expert_workers_a_request_waits_until_somebody_aborts_it(checkpoint: Path) -> None:
    with engine(checkpoint, experts_in_process=False) as (child, loaded):
        assert loaded.store_host == "127.0.0.1"
        assert loaded.store_port > 0
        child.send(request("a", 3))
        waiting = child.until(Stats, lambda stats: stats.num_waiting == 1)
        assert (waiting.epoch, waiting.num_running, waiting.num_steps) == (0, 0, 0)
        child.send(Abort("a"))
        child.until(Stats, lambda stats: stats.num_waiting == 0)


def test_a_link_nobody_comes_to_fails_by_rank_and_in_time(checkpoint: Path) -> None:
    with engine(checkpoint, experts_in_process=False) as (child, _):
        member: dict[str, int | str] = {"ep_rank": 0, "worker": "w0", "incarnation": 1, "prefix": "nobody"}
        start = time.monotonic()
        child.send(Connect(1, [member], [], 1.0))
        failed = child.until(LinkFailed)
        assert (failed.epoch, failed.ep_rank) == (1, 0)
        assert time.monotonic() - start < 10


def test_the_end_of_the_channel_ends_the_process_even_in_a_long_answer(checkpoint: Path) -> None:
    with engine(checkpoint) as (child, _):
        child.send(request("a", 3, max_tokens=100_000))
        child.until(Tokens)
        child.hang_up()
        child.process.wait(10)


def test_shutdown_ends_the_process_with_status_zero(checkpoint: Path) -> None:
    with engine(checkpoint) as (child, _):
        child.send(Shutdown())
        assert child.process.wait(10) == 0


def test_a_checkpoint_without_a_shard_is_named_and_ends_the_process_with_two(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family="v3", **SMALL)
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert_fatal(configure(tmp_path), "CheckpointError", shard.name)


def test_a_cache_without_room_for_a_block_ends_the_process_with_two(checkpoint: Path) -> None:
    assert_fatal(configure(checkpoint, kv_cache_bytes=100), "ConfigError", "hold no block of 16 tokens")


def assert_fatal(first: object, kind: str, text: str) -> None:
    with engine_process() as child:
        child.send(first)
        while not isinstance(message := child.next(), Fatal):
            assert message is not None
            assert not isinstance(message, Loaded | Rejected)
        assert message.kind == kind
        assert text in message.message
        assert child.next() is None
        assert child.process.wait(10) == 2


def test_a_message_out_of_place_is_told_and_ends_the_process_with_one(checkpoint: Path) -> None:
    with engine(checkpoint) as (child, _):
        child.send(configure(checkpoint))
        while not isinstance(message := child.next(), Fatal):
            assert message is not None
        assert (message.kind, message.message) == ("ControlError", "Configure is not expected here")
        assert child.process.wait(10) == 1
