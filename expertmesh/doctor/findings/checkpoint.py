"""Can the model directory be read, is it complete, and can its experts be dealt out?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertmesh.doctor.finding import Finding, failure, not_applicable, ok, warning

SUBJECT = "model"
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


def judge_experts(problem: str) -> Iterator[Finding]:
    """Say it where the routed experts cannot be dealt out; `problem` is the sentence, empty without one."""
    if problem:
        yield failure(
            SUBJECT, problem, "the router ends with this sentence", "choose another worldSize or moe_ep"
        )
