"""The same logits to the last bit: alone, in a batch, in chunks, in other blocks, replayed, more threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router.plan import Chunk
from router.sequence import Sequence
from tests.quantized_checkpoint import write_w8a8
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import write_checkpoint

VOCAB_SIZE = 512
LENGTHS = (1, 5, 16, 17, 40, 130)


@pytest.fixture(
    scope="module",
    params=[
        *itertools.product(("v2", "v3"), ("float32", "bfloat16", "w8a8_dynamic")),
        ("v3", "w8a8"),
    ],
    ids="-".join,
)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    family, stored = request.param
    directory: Path = tmp_path_factory.mktemp("checkpoint")
    is_int8 = stored.startswith("w8a8")
    dtype = "bfloat16" if is_int8 else stored
    write_checkpoint(directory / "floats", family, vocab_size=VOCAB_SIZE, torch_dtype=dtype)
    if is_int8:
        write_w8a8(directory / "floats", directory / stored, static_attention=stored == "w8a8")
    return Driver(directory / (stored if is_int8 else "floats"), num_blocks=2048)


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(driver: Driver) -> list[Tensor]:
    """The last logits of every prompt, each computed by itself in one piece and one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logits = [driver.finish(driver.sequence(prompt))[0] for prompt in random_prompts(LENGTHS, VOCAB_SIZE)]
    torch.set_num_threads(before)
    return logits


def test_a_batch_changes_no_bit(driver: Driver, alone: list[Tensor], threads: int) -> None:
    sequences = [driver.sequence(prompt) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)]
    assert torch.equal(driver.finish(*sequences), torch.stack(alone))
    again = [driver.sequence(prompt) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)][::-1]
    assert torch.equal(driver.finish(*again), torch.stack(alone[::-1]))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50])
def test_chunks_change_no_bit(driver: Driver, alone: list[Tensor], chunk_size: int) -> None:
    sequences = [driver.sequence(prompt) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)]
    assert torch.equal(driver.finish(*sequences, chunk_size=chunk_size), torch.stack(alone))


def decode_alone(driver: Driver, prompt: list[int], answer: list[int]) -> list[Tensor]:
    """Return the logits after each token of the answer, one token per step."""
    sequence = driver.sequence(prompt, room=len(answer))
    driver.finish(sequence)
    rows = []
    for token_id in answer:
        sequence.tokens.append(token_id)
        rows.append(driver.finish(sequence)[0])
    return rows


def test_decoding_beside_others_changes_no_bit(driver: Driver) -> None:
    prompts = random_prompts((3, 60, 129), VOCAB_SIZE, seed=2)
    answers = random_prompts((4, 4, 4), VOCAB_SIZE, seed=3)
    expected = [decode_alone(driver, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    sequences = [driver.sequence(prompt, room=4) for prompt in prompts]
    driver.finish(*sequences)
    for index in range(4):
        for sequence, answer in zip(sequences, answers, strict=True):
            sequence.tokens.append(answer[index])
        newcomer = driver.sequence(prompts[index % 3])
        logits = driver.finish(newcomer, *sequences)
        assert torch.equal(logits[1:], torch.stack([rows[index] for rows in expected]))


def test_a_replay_of_prompt_and_answer_in_one_step_changes_no_bit(driver: Driver) -> None:
    (prompt,), (answer,) = random_prompts((37,), VOCAB_SIZE, seed=4), random_prompts((9,), VOCAB_SIZE, seed=5)
    expected = decode_alone(driver, prompt, answer)[-1]
    for chunk_size in (None, 5, 40):
        replayed = driver.sequence(prompt + answer, num_prompt_tokens=len(prompt))
        assert torch.equal(driver.finish(replayed, chunk_size=chunk_size)[0], expected)


def test_what_stood_in_the_blocks_before_changes_no_bit(driver: Driver, alone: list[Tensor]) -> None:
    prompt = random_prompts(LENGTHS, VOCAB_SIZE)[4]
    used = driver.sequence(random_prompts((130,), VOCAB_SIZE, seed=9)[0])
    driver.finish(used)
    sequence = Sequence("reuses", prompt, len(prompt), 1)
    sequence.block_table = used.block_table[::-1][:3]
    assert torch.equal(driver.step(Chunk(sequence, 0, len(prompt), True))[0], alone[4])


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_change_no_bit(driver: Driver, alone: list[Tensor], micro_batches: int) -> None:
    driver.micro_batches = micro_batches
    try:
        sequences = [driver.sequence(prompt) for prompt in random_prompts(LENGTHS, VOCAB_SIZE)]
        assert torch.equal(driver.finish(*sequences), torch.stack(alone))
    finally:
        driver.micro_batches = 1


@pytest.mark.parametrize("is_tied", [False, True], ids=["lm_head", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_stay_in_the_dtype_of_the_model(dtype: str, is_tied: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2", vocab_size=128, torch_dtype=dtype, tie_word_embeddings=is_tied)
    driver = Driver(tmp_path)
    found: list[torch.dtype] = []
    driver.model.register_forward_hook(lambda model, given, logits: found.append(logits.dtype))
    driver.finish(driver.sequence([1, 2, 3]))
    assert found == [getattr(torch, dtype)]
