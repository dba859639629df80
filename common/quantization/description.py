"""What msModelSlim writes beside int8 weights: a file that gives the type of every tensor. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import CheckpointError
from common.model_json import read_json_object

DESCRIPTION_PATTERN = "quant_model_description*.json"
"""Newer versions write quant_model_description.json, older ones put the type of the weights into the name."""

FLOAT = "FLOAT"
W8A8 = "W8A8"
W8A8_DYNAMIC = "W8A8_DYNAMIC"
TYPES = (FLOAT, W8A8, W8A8_DYNAMIC)
"""Floating point; int8 with one scale and offset for all activations; int8 with a scale for every row."""


@dataclass(frozen=True, slots=True)
class Description:
    """The types of the tensors of one directory, and the file that says so."""

    file: Path
    types: Mapping[str, object]

    def type_of(self, name: str) -> str:
        """Return the type of a weight, one of TYPES.

        Raises:
            CheckpointError: the file does not name the weight, or gives it another type.
        """
        stated = self.types.get(name)
        if stated is None:
            raise CheckpointError(f"{self.file} says nothing about {name}, but it must give its type")
        if stated not in TYPES:
            raise CheckpointError(
                f"{self.file}: the type of {name} is {stated!r}, but only {', '.join(TYPES)} are supported"
            )
        return str(stated)


def find_description(directory: Path) -> Path | None:
    """Return the description of a directory, or None where there is none.

    Raises:
        CheckpointError: there are two.
    """
    files = sorted(Path(directory).glob(DESCRIPTION_PATTERN))
    if len(files) > 1:
        raise CheckpointError(
            f"{directory} holds {files[0].name} and {files[1].name}, but one file must describe its tensors: "
            f"remove the one that belongs to other weights"
        )
    return files[0] if files else None


def read_description(directory: Path) -> Description | None:
    """Read the description of a directory, if it has one.

    Raises:
        CheckpointError: there are two, or it is not a JSON object.
    """
    file = find_description(directory)
    return None if file is None else Description(file, read_json_object(file))
