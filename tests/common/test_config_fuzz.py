"""Whatever stands in a configuration file, it is a configuration or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import Config, load_config
from common.errors import ConfigError
from tests.common.config_examples import LEVEL_1, LEVEL_2, changed, completed

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0.0.0.0", "auto", "{}", '{"deepseek_v3": {"ep_level": 2}}', "::", "a\nb", "\ud800"])
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(
    ["ServerConfig", "BackendConfig", "ModelDeployConfig", "ScheduleConfig", "LogConfig", "ExpertMesh"]
)


def paths_in(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every value in a document."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(found for key, entry in entries for found in paths_in(entry, (*path, key)))]


ORIGINALS = (completed(LEVEL_1), completed(LEVEL_2), changed("ExpertMesh.fleetPort", 0))
PLACES = [(original, path) for original in ORIGINALS for path in paths_in(original) if path]


def mutated(original: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of a document with another value at one place."""
    copy = json.loads(json.dumps(original))
    here = copy
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return copy


def sentences_about(file: Path, content: bytes) -> tuple[str, ...]:
    """What is said about a file: its problems, or the warnings of the configuration it is."""
    file.write_bytes(content)
    try:
        config = load_config(file)
    except ConfigError as error:
        return (str(error), *error.problems)
    return (str(isinstance(config, Config)), *config.warnings)


def assert_is_config_or_one_line(file: Path, content: bytes) -> None:
    sentences = sentences_about(file, content)
    assert all(len(sentence.splitlines()) == 1 for sentence in sentences), sentences


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.json"


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(content=st.binary(max_size=80))
@settings(FUZZ, max_examples=200)
def test_any_bytes(file: Path, content: bytes) -> None:
    assert_is_config_or_one_line(file, content)


@given(document=st.dictionaries(SECTIONS | st.text(max_size=5), DOCUMENTS, max_size=4))
@settings(FUZZ, max_examples=300)
def test_any_json_object(file: Path, document: Any) -> None:
    assert_is_config_or_one_line(file, json.dumps(document).encode())


@given(place=st.sampled_from(PLACES), value=DOCUMENTS)
@settings(FUZZ, max_examples=500)
def test_a_valid_file_with_another_value_at_one_place(file: Path, place: Any, value: Any) -> None:
    original, path = place
    assert_is_config_or_one_line(file, json.dumps(mutated(original, path, value)).encode())


@given(
    places=st.lists(st.sampled_from([path for path in paths_in(ORIGINALS[1]) if path]), max_size=4),
    data=st.data(),
)
@settings(FUZZ, max_examples=300)
def test_a_valid_file_with_many_bad_values(file: Path, places: Any, data: st.DataObject) -> None:
    document = ORIGINALS[1]
    for path in sorted(places, key=len, reverse=True):
        document = mutated(document, path, data.draw(SCALARS))
    assert_is_config_or_one_line(file, json.dumps(document).encode())
