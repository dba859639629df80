"""One JSON object of the configuration file, and the warnings about what in it has no effect.

A key that MindIE knows and expertmesh does not use carries `Ignored`; a key that nobody knows stays in the
model as an extra. `warnings_of` names both: MindIE's files load as they are, and nothing is ignored silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


@dataclass(frozen=True, slots=True)
class Ignored:
    """Marks a field that is checked and has no effect. `reason` ends the sentence "PATH is ignored: ..."."""

    reason: str = "expertmesh does not need it"


class Section(BaseModel):
    """One JSON object of the file. Values are taken as they stand: 2.0 is no integer, 1 is no boolean."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="allow",
        alias_generator=to_camel,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Port = Annotated[int, Field(ge=0, le=65535)]
"""0 takes a free port."""
IgnoredPort = Annotated[int | None, Field(ge=1024, le=65535), Ignored()]
IgnoredBool = Annotated[bool, Ignored()]
IgnoredCount = Annotated[int | None, Field(ge=0), Ignored()]
IgnoredText = Annotated[str | None, Ignored()]
IgnoredTexts = Annotated[tuple[str, ...] | None, Ignored()]
IgnoredObject = Annotated[dict[str, Any] | None, Ignored()]


def matching(pattern: str, rule: str) -> AfterValidator:
    """Take only text that `pattern` matches; `rule` says it for people: "must be HOST:PORT"."""

    def check(text: str | None) -> str | None:
        if text is not None and re.fullmatch(pattern, text) is None:
            raise ValueError(rule)
        return text

    return AfterValidator(check)


Address = Annotated[
    str,
    Field(min_length=1),
    matching(r"(?!interface:).*|interface:[^\s/:]{1,15}", "must be an address or interface:NAME"),
]
"""Of this host; `interface:NAME` stands for the one on an interface (common.own_address)."""


def key_of(section: type[BaseModel], name: str) -> str:
    """The JSON key of a field."""
    return section.model_fields[name].alias or name


def warnings_of(section: BaseModel, path: str = "") -> Iterator[str]:
    """Name every key of `section` that has no effect, with its JSON path.

    A key that is at its default asks for nothing, for example dp 1 or npuMemSize -1.
    """
    for key in section.model_extra or {}:
        name = key if key.isprintable() else repr(key)
        yield f"{path}{name} is ignored: expertmesh does not know this key"
    for name, field in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        here = f"{path}{field.alias or name}"
        value = getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, Ignored) and value != field.default:
                yield f"{here} is ignored: {mark.reason}"
        for index, entry in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(entry, BaseModel):
                yield from warnings_of(entry, f"{here}[{index}]." if isinstance(value, tuple) else f"{here}.")
