"""What is wrong with a configuration, one sentence for each bad value, and what is left without them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common.config_file import ConfigFile
from common.expertmesh_section import ExpertMeshSection
from common.section import key_of

MOST_LETTERS = 80

Location = tuple[str | int, ...]

RULES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda _: "must be an integer",
    "float_type": lambda _: "must be a number",
    "finite_number": lambda _: "must be a finite number",
    "bool_type": lambda _: "must be true or false",
    "string_type": lambda _: "must be a string",
    "tuple_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be an object",
    "model_type": lambda _: "must be an object",
    "missing": lambda _: "must have two elements",
    "too_long": lambda limit: f"must have at most {limit['max_length']} elements",
    "too_short": lambda limit: f"must have at least {limit['min_length']} elements",
    "greater_than": lambda limit: f"must be above {limit['gt']:g}",
    "greater_than_equal": lambda limit: f"must be at least {limit['ge']}",
    "less_than_equal": lambda limit: f"must be at most {limit['le']}",
    "literal_error": lambda limit: f"must be {limit['expected']}",
    "string_too_long": lambda limit: f"must have at most {limit['max_length']} characters",
    "string_too_short": lambda limit: f"must have at least {limit['min_length']} characters",
    "value_error": lambda limit: str(limit["error"]),
}
"""What a value must be, by pydantic's name of the error."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One sentence about a bad value.

    Attributes:
        keys: the last keys of all JSON paths that it is about.
        path: the JSON path that it begins with.
    """

    keys: frozenset[str]
    path: str
    sentence: str


def validated(document: dict[str, Any], variables: Mapping[str, str]) -> tuple[ConfigFile, list[Problem]]:
    """Check every value by itself, leaving out those that are wrong, so that the rest can be checked further.

    Args:
        document: the whole configuration.
        variables: the environment variable that a key came from, by names like "ExpertMesh.fleetPort".
    """
    document = copy.deepcopy(document)
    problems: list[Problem] = []
    text, before = json.dumps(document), ""
    # Nothing can be left out where text is no Unicode, or nesting has no end.
    while text != before:
        try:
            return ConfigFile.model_validate_json(text), problems
        except ValidationError as error:
            found = error.errors(include_url=False)
        for one in found:
            key = remove(document, one["loc"])
            problems.append(Problem(frozenset({key}), _path(one), _sentence(one, variables)))
        before, text = text, json.dumps(document)
    return ConfigFile(), problems


def remove(document: dict[str, Any], location: Location) -> str:
    """Take out the innermost key on the way to `location`; return it, or "" where there is none."""
    here: Any = document
    owner, key = None, ""
    for step in location:
        if isinstance(here, str) and owner is not None:
            # `models` may be an object that is written as a string.
            here = owner[key] = json.loads(here)
        if isinstance(here, dict):
            if step not in here:
                # An earlier problem took it out already, or what it stands in.
                return str(step)
            owner, key = here, str(step)
        elif not (isinstance(here, list) and isinstance(step, int) and step < len(here)):
            break
        here = here[step]
    if owner is not None:
        del owner[key]
    return key


def json_path(location: Location) -> str:
    """Write a location as ModelDeployConfig.ModelConfig[0].worldSize."""
    path = ""
    for key in location:
        part = repr(key) if isinstance(key, str) and not key.isprintable() else key
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "the configuration"


def json_line(value: Any, most: int = MOST_LETTERS) -> str:
    """Write a value, whole lists too, as it stands in the file: in one line of at most `most` letters."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _path(error: Any) -> str:
    # What is missing has no place of its own: the sentence is about what lacks it.
    return json_path(error["loc"][:-1] if error["type"] == "missing" else error["loc"])


def _sentence(error: Any, variables: Mapping[str, str]) -> str:
    path = _path(error)
    if error["type"] == "json_invalid":
        return f"{path} is no valid JSON: {error['ctx']['error']}"
    if error["type"] == "extra_forbidden":
        known = sorted(key_of(ExpertMeshSection, name) for name in ExpertMeshSection.model_fields)
        return (
            f"{path} is no key of its section, whose keys are {', '.join(known)}: correct it or leave it out"
        )
    rule = RULES[error["type"]](error.get("ctx", {})) if error["type"] in RULES else f"fails: {error['msg']}"
    sources = [
        variable for key, variable in variables.items() if f".{path}".replace("[0]", "").endswith(f".{key}")
    ]
    source = f" (from {sources[0]})" if sources else ""
    return f"{path} is {json_line(error['input'])}{source}, but it {rule}"
