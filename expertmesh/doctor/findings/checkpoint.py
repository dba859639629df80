"""Can the model directory be read, is it complete, and does the fleet fit it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.preflight import Finding as Checked
from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

SUBJECT = "model"
PREFLIGHT = "before weights"
DENIED = "Permission denied"


def judge_checkpoint(
    model: Path | None, answer: Mapping[str, Any], *, is_there: bool, is_worker: bool, has_tokenizer: bool
) -> Iterator[Finding]:
    """Judge what the examination of the model directory says.

    Args:
        is_there: whether the directory exists.
        is_worker: whether it is needed here only if the router's path means nothing on this machine.
        has_tokenizer: whether it holds a tokenizer.json.
    """
    if model is None:
        if is_worker:
            yield not_applicable(SUBJECT, "no directory is named: a worker takes the router's path")
        else:
            yield failure(
                SUBJECT,
                "no checkpoint is named",
                "no checkpoint was given: name its directory with --model DIR",
                "set ModelConfig[0].modelWeightPath, or use --model DIR",
            )
        return
    if not is_there:
        yield failure(
            SUBJECT,
            f"{model} does not exist on this machine, or this user may not look there",
            "config.json is missing: a Hugging Face model directory must contain it",
            "copy the checkpoint to this machine, mount it into the container, or correct modelWeightPath",
        )
    elif "error" in answer:
        yield failure(
            SUBJECT,
            str(answer["error"]),
            "router or worker end with this sentence",
            _remedy(str(answer["error"]), model),
        )
    elif answer["num_missing"]:
        yield failure(
            SUBJECT,
            f"{model} lacks {answer['num_missing']} tensors of the model in its config.json, for example "
            f"{answer['missing'][0]}",
            f"{model} lacks {answer['missing'][0]}, ..., which config.json asks for",
            "copy the missing shards (*.safetensors) again",
        )
    else:
        size = answer["num_bytes"] / 1e9
        yield ok(
            SUBJECT,
            f"{model} is complete: {answer['num_tensors']} tensors in {answer['num_files']} "
            f"{'file' if answer['num_files'] == 1 else 'files'}, {size:.3g} GB",
        )
        if not is_worker and not has_tokenizer:
            yield warning(
                SUBJECT,
                f"{model} has no tokenizer.json",
                "text is refused: the checkpoint has no tokenizer.json: send token_ids instead",
                "copy tokenizer.json and tokenizer_config.json into the directory",
            )


def _remedy(error: str, model: Path) -> str:
    if DENIED in error:
        return f"let the user of the services read it: chmod -R a+rX {model}"
    return "copy what is missing or damaged again; compare file sizes with where it came from"


def judge_preflight(checked: Iterable[Checked]) -> Iterator[Finding]:
    """Report what the services check before they load a model."""
    for one in checked:
        if one.is_met:
            yield ok(PREFLIGHT, one.sentence)
        else:
            yield failure(PREFLIGHT, one.sentence, "the service ends with this sentence", one.remedy)
