"""docs/configuration.md says of every key what the models say: type, range, default, and what it does."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config import MARKS
from common.config_file import ConfigFile
from common.deepseek_section import DeepseekV2
from common.expertmesh_section import ExpertMeshSection
from common.mindie import BackendConfig, LogConfig, ScheduleConfig, ServerConfig
from common.mindie_model import ModelConfig, ModelDeployConfig
from common.mindie_tls import BackendTls, ServerTls
from common.not_built import REFUSED
from common.reload_class import DRAIN, FLEET, HOT, ROUTER, WORKERS, ReloadClass
from common.section import Ignored, key_of
from tests.source import ROOT

SECTIONS: dict[str, type[BaseModel]] = {
    "The file": ConfigFile,
    "ServerConfig": ServerConfig,
    "BackendConfig": BackendConfig,
    "ModelDeployConfig": ModelDeployConfig,
    "ModelConfig": ModelConfig,
    "models.deepseekv2": DeepseekV2,
    "ScheduleConfig": ScheduleConfig,
    "LogConfig": LogConfig,
    "ExpertMesh": ExpertMeshSection,
}
NEVER_BUILT = {"ModelConfig.trustRemoteCode"}
CERTIFICATES = {key_of(section, name) for section in (ServerTls, BackendTls) for name in section.model_fields}
WORDS = {int: "int", float: "number", bool: "bool", str: "string", tuple: "list", dict: "object", Any: "any"}
LIMITS = ("ge", "gt", "le", "lt", "max_length")


class Row(NamedTuple):
    kind: str
    default: str
    effect: str
    meaning: str


@cache
def document() -> dict[str, str]:
    """The text of each chapter by its title."""
    chapters = (ROOT / "docs" / "configuration.md").read_text().split("\n## ")[1:]
    titles = [chapter.partition("\n")[0] for chapter in chapters]
    return {re.sub(r"`|\[0\]", "", title): chapter for title, chapter in zip(titles, chapters, strict=True)}


@cache
def rows_of(title: str) -> dict[str, Row]:
    """The rows of a chapter's table by key."""
    lines = [line for line in document()[title].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({key for key, *_ in cells}) == len(cells), "a key has two rows"
    return {key.strip("`"): Row(*rest) for key, *rest in cells}


def fields_of(section: type[BaseModel], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a section; those of a section inside it that has no chapter with a dot."""
    for name, field in section.model_fields.items():
        key = before + key_of(section, name)
        inner = type(field.default)
        has_no_chapter = issubclass(inner, BaseModel) and inner not in SECTIONS.values() and key != "models"
        if has_no_chapter:
            yield from fields_of(inner, f"{key}.")
        elif key not in CERTIFICATES:
            yield key, field


FIELDS = [(title, key, field) for title, model in SECTIONS.items() for key, field in fields_of(model)]


def each_field(test: Any) -> Any:
    names = [f"{title}.{key}" for title, key, _ in FIELDS]
    return pytest.mark.parametrize(("title", "key", "field"), FIELDS, ids=names)(test)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_document_has_every_key_and_no_other(title: str) -> None:
    assert list(rows_of(title)) == [key for key, _ in fields_of(SECTIONS[title])]


def test_the_document_has_every_key_for_certificates_and_no_other() -> None:
    lines = document()["Certificates"].splitlines()
    found = {line.split("`")[1]: re.findall(r"`(\w+)`", line)[1:] for line in lines if line.startswith("* ")}
    assert {section: sorted(keys) for section, keys in found.items()} == {
        "ServerConfig": sorted(key_of(ServerTls, name) for name in ServerTls.model_fields),
        "BackendConfig": sorted(key_of(BackendTls, name) for name in BackendTls.model_fields),
    }


def bare(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without None and Annotated, and what it was annotated with."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not types.NoneType)
    if get_origin(annotation) is not Annotated:
        return annotation, []
    inner, *marks = get_args(annotation)
    found = [one for mark in marks for one in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    return inner, found


@each_field
def test_the_document_has_its_type_and_range(title: str, key: str, field: FieldInfo) -> None:
    row = rows_of(title)[key]
    annotation, marks = bare(field.annotation)
    if get_origin(annotation) is Literal:
        assert re.findall(r"`([^`]+)`", row.kind) == [json.dumps(one) for one in get_args(annotation)]
        return
    is_object = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    word = "object" if is_object else WORDS[get_origin(annotation) or annotation]
    assert word in re.findall(r"[a-z]+", row.kind)
    stated = {float(number) for number in re.findall(r"-?\d+", row.kind)}
    limits = (getattr(mark, name, None) for mark in [*field.metadata, *marks] for name in LIMITS)
    assert {float(limit) for limit in limits if limit is not None} <= stated


@each_field
def test_the_document_has_its_default(title: str, key: str, field: FieldInfo) -> None:
    default = field.default[0] if key == "ModelConfig" else field.default
    is_stated_elsewhere = default is None or isinstance(default, BaseModel)
    assert rows_of(title)[key].default == ("-" if is_stated_elsewhere else f"`{json.dumps(default)}`")


@each_field
def test_the_document_says_whether_it_acts(title: str, key: str, field: FieldInfo) -> None:
    row = rows_of(title)[key]
    reasons = [mark.reason for mark in field.metadata if isinstance(mark, Ignored)]
    if reasons:
        assert row.effect == "warns"
    elif f"{title}.{key}" in {*REFUSED, *NEVER_BUILT}:
        assert row.effect == "refused"
    else:
        assert row.effect == "acts"
    assert [reason for reason in reasons if reason != row.meaning.replace("`", "")] == []


WHAT_IS_STARTED_AGAIN = {
    "": HOT,
    "the router": ROUTER,
    "the router and its expert workers": FLEET,
    "the expert workers": WORKERS,
}


def test_the_document_has_the_reload_class_of_every_key() -> None:
    lines = [line for line in document()["Reload"].splitlines() if line.startswith("| ")][1:]
    found: dict[str, ReloadClass] = {}
    for name, when, keys in ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines):
        started = re.search(r"when (the .*) (was|were) started again$", when)
        reload = DRAIN if name == "drain" else WHAT_IS_STARTED_AGAIN[started[1] if started else ""]
        assert reload.name == name
        for key in re.findall(r"`([^`]+)`", keys):
            assert key not in found, "a key has two classes"
            found[key] = reload
    assert found == {mark.key: mark.reload for mark in MARKS.values()}


def test_what_is_not_hot_says_what_a_change_needs() -> None:
    assert HOT.needs == ""
    assert "expert workers" in FLEET.needs
    assert "expert workers" in WORKERS.needs
    assert "finish" in DRAIN.needs
    assert "router" in ROUTER.needs
