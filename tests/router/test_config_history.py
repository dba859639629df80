"""Versions of the configuration, in memory and on disk: whole or not there, whenever the router dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, NotReady, VersionUnknown
from router.front.config_history import MOST_VERSIONS, ConfigHistory
from router.front.config_version import hash_of
from router.front.version_files import VersionFiles

SYSTEM_CALLS = ("open", "write", "fsync", "close", "replace")


class Crash(BaseException):
    """The process dies here: nobody cleans up after it."""


@contextmanager
def opened(directory: Path) -> Iterator[ConfigHistory]:
    history = ConfigHistory(VersionFiles(directory))
    try:
        yield history
    finally:
        history.close()


def numbers(history: ConfigHistory) -> list[int]:
    return [version.number for version in history.versions]


def failing_at(
    monkeypatch: pytest.MonkeyPatch, count: int, error: Callable[[], BaseException], before: bool
) -> list[str]:
    """Let the system call number `count` fail, before or after it did its work; the list tells the calls."""
    calls: list[str] = []

    def failing(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == count and before:
                raise error()
            result = real(*arguments, **options)
            if len(calls) == count:
                raise error()
            return result

        return call

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


def test_versions_are_numbered_found_and_end_with_the_process_when_there_is_no_directory() -> None:
    history = ConfigHistory(None)
    assert history.last_good is None
    first = history.append({"a": 1}, "start", "file")
    second = history.append({"a": 2}, "peer", "reload")
    assert (first.number, second.number, history.directory) == (1, 2, "")
    assert history.find(1) is first
    assert history.last_good is second
    with pytest.raises(VersionUnknown, match="version 3 is not kept; these are: 1, 2"):
        history.find(3)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    with opened(tmp_path / "deep" / "state") as history:
        written = [
            history.append({"a": number, "b": [1.5, None, "x"]}, "peer", "reload") for number in range(3)
        ]
    with opened(tmp_path / "deep" / "state") as history:
        assert list(history.versions) == written
        assert history.append({}, "start", "file").number == 4


def test_only_the_owner_may_read_the_directory_and_its_files(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as history:
        history.append({}, "start", "file")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "state").iterdir())


def test_old_versions_are_forgotten_on_disk_too_and_numbers_go_on(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        for number in range(MOST_VERSIONS + 3):
            history.append({"a": number}, "peer", "reload")
        expected = list(range(4, MOST_VERSIONS + 4))
        assert numbers(history) == expected
    assert len(list(tmp_path.glob("config-*.json"))) == MOST_VERSIONS
    with opened(tmp_path) as history:
        assert numbers(history) == expected
        assert history.append({}, "peer", "reload").number == MOST_VERSIONS + 4


def test_two_routers_cannot_share_a_directory(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ConfigError, match="another router uses it"):
        VersionFiles(tmp_path)
    with opened(tmp_path):
        pass


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"stateDir is .*file/state and cannot be used: Not a directory"):
        VersionFiles(tmp_path / "file" / "state")


def num_calls(directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with opened(directory) as history, monkeypatch.context() as patched:
        calls = failing_at(patched, 10**6, Crash, before=True)
        history.append({"a": 0}, "start", "file")
    return len(calls)


@pytest.mark.parametrize("before", [True, False])
def test_a_router_that_dies_at_any_system_call_leaves_the_old_versions_or_all_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    total = num_calls(tmp_path / "count", monkeypatch)
    assert total >= 8
    outcomes = []
    for count in range(1, total + 1):
        directory = tmp_path / str(count)
        with opened(directory) as history:
            history.append({"a": 1}, "start", "file")
            with monkeypatch.context() as patched:
                failing_at(patched, count, Crash, before)
                with pytest.raises(Crash):
                    history.append({"a": 2}, "peer", "reload")
        with opened(directory) as history:
            documents = [version.document for version in history.versions]
            assert documents in ([{"a": 1}], [{"a": 1}, {"a": 2}])
            assert history.damaged == []
            outcomes.append(len(documents))
            assert history.append({"a": 3}, "peer", "reload").number == len(documents) + 1
        assert {path.name for path in directory.iterdir() if not path.name.endswith(".json")} == {"lock"}
    # Once it is there it stays there, and it is there before `append` returns.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("before", [True, False])
def test_a_disk_that_fails_at_any_system_call_adds_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    total = num_calls(tmp_path / "count", monkeypatch)
    for count in range(1, total + 1):
        directory = tmp_path / str(count)
        with opened(directory) as history:
            first = history.append({"a": 1}, "start", "file")
            with monkeypatch.context() as patched:
                failing_at(patched, count, lambda: OSError(28, "No space left on device"), before)
                with pytest.raises(
                    NotReady, match=r"version 2 could not be written .*No space left"
                ) as caught:
                    history.append({"a": 2}, "peer", "reload")
            assert caught.value.reason == "HISTORY_NOT_WRITTEN"
            assert history.versions == (first,)
            # The number is not used twice: somebody may have seen it.
            assert history.append({"a": 3}, "peer", "reload").number == 3
        with opened(directory) as history:
            assert [version.document for version in history.versions] == [{"a": 1}, {"a": 3}]


def test_a_file_that_was_cut_off_anywhere_is_left_out_and_named(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        history.append({"a": 1}, "start", "file")
        history.append({"a": 2}, "peer", "reload")
    file = tmp_path / "config-0000000002.json"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with opened(tmp_path) as history:
            assert numbers(history) == [1]
            assert len(history.damaged) == 1
            assert "version 2 of the configuration is lost" in history.damaged[0]


def test_a_file_whose_content_was_changed_is_left_out_and_its_number_is_not_used_again(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as history:
        history.append({"a": 1}, "start", "file")
        history.append({"a": 2}, "peer", "reload")
    file = tmp_path / "config-0000000002.json"
    for change in (
        {"document": {"a": 3}},
        {"sha256": "0"},
        {"number": 1},
        {"created_s": "x"},
        {"document": 4},
    ):
        original = file.read_text()
        file.write_text(json.dumps(json.loads(original) | change))
        with opened(tmp_path) as history:
            assert numbers(history) == [1]
        file.write_text(original)
    file.write_text("[]")
    with opened(tmp_path) as history:
        assert history.append({}, "peer", "reload").number == 3


def test_the_hash_is_of_the_values_and_not_of_their_order() -> None:
    assert hash_of({"a": 1, "b": {"c": 2, "d": 3}}) == hash_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({hash_of({"a": value}) for value in (1, 1.0, True, "1", None)}) == 5
