"""Reads one JSON object of a model directory. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """Return what `file` holds.

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: a Hugging Face model directory must contain it") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, but it must hold a JSON object")
    return value
