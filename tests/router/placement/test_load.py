"""The load file: read back, measured, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.placement import Placement
from router.placement.load import ExpertLoads, balancedness, read_loads, uniform, worker_loads

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["layers", "1", "2", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def written(tmp_path: Path, document: Any) -> Path:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(document))
    return file


def test_a_load_file_gives_the_tokens_of_every_layer(tmp_path: Path) -> None:
    file = written(tmp_path, {"layers": {"2": [0, 7, 1 << 62], "1": [1, 2, 3]}})
    assert read_loads(file, 3, [1, 2]) == ExpertLoads({1: (1, 2, 3), 2: (0, 7, 1 << 62)})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], ["a list with 0 entries", "layers"]),
        ({}, ["without the key layers"]),
        ({"layers": {"1": [1, 2]}, "window": 3}, ['the key "window"', "leave it out"]),
        ({"layers": [1]}, ["layers is a list", "object"]),
        ({"layers": {}}, ['no key "1"', "add it"]),
        ({"layers": {"1": [1, 2], "5": [1, 2]}}, ['the key "5"', "1 to 1"]),
        ({"layers": {"01": [1, 2], "1": [1, 2]}}, ['the key "01"']),
        ({"layers": {"1": {"0": 1}}}, ["layers.1", "2 routed experts"]),
        ({"layers": {"1": [1]}}, ["layers.1", "2 routed experts"]),
        ({"layers": {"1": [1, -1]}}, ["layers.1[1]", "-1"]),
        ({"layers": {"1": [True, 1]}}, ["layers.1[0]", "true"]),
        ({"layers": {"1": [1, 1.0]}}, ["layers.1[1]", "1.0"]),
        ({"layers": {"1": [1, 1 << 63]}}, ["layers.1[1]", str((1 << 63) - 1)]),
        ({"layers": {"1": [1, "y" * 9999]}}, ["layers.1[1]", "yyy..."]),
    ],
)
def test_a_fault_is_one_sentence_with_file_and_place(tmp_path: Path, document: Any, words: list[str]) -> None:
    file = written(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        read_loads(file, 2, [1])
    for word in (str(file), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":1,"a":2}', "twice"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    file = tmp_path / "loads.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=word):
        read_loads(file, 2, [1])


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an ordinary file"):
        read_loads(tmp_path, 2, [1])
    with pytest.raises(ConfigError, match="No such file"):
        read_loads(tmp_path / "absent.json", 2, [1])


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    with file.open("wb") as stream:
        stream.truncate((10 << 20) + 1)
    with pytest.raises(ConfigError, match="10485761 bytes"):
        read_loads(file, 2, [1])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON)
def test_any_document_is_taken_or_refused_in_one_sentence(tmp_path: Path, document: Any) -> None:
    file = written(tmp_path, document)
    is_right = (
        isinstance(document, dict) and list(document) == ["layers"] and is_layer_one(document["layers"])
    )
    if is_right:
        assert read_loads(file, 2, [1]).layers == {1: tuple(document["layers"]["1"])}
    else:
        with pytest.raises(ConfigError, match=r"^[^\n]*\Z"):
            read_loads(file, 2, [1])


def is_layer_one(layers: Any) -> bool:
    """Whether this is one layer, 1, with two counts."""
    if not isinstance(layers, dict) or list(layers) != ["1"]:
        return False
    tokens = layers["1"]
    return (
        isinstance(tokens, list)
        and [type(count) for count in tokens] == [int, int]
        and all(0 <= count < 1 << 63 for count in tokens)
    )


def test_replicas_share_the_tokens_of_their_expert() -> None:
    placement = Placement({1: ((0, 1), (0, 2)), 2: ((0, 1), (1, 2))})
    loads = ExpertLoads({1: (6, 3, 1), 2: (0, 0, 0)})
    assert worker_loads(placement, loads) == {1: (6.0, 4.0), 2: (0.0, 0.0)}
    assert balancedness(placement, loads) == {1: pytest.approx(5 / 6), 2: 1.0}


def test_uniform_loads_cover_every_layer() -> None:
    assert uniform(2, [3, 4]) == ExpertLoads({3: (1, 1), 4: (1, 1)})
