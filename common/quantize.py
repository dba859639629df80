"""Quantises a checkpoint to W8A8: `python -m common.quantize SOURCE TARGET`; docs/checkpoints.md says how."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.errors import CheckpointError
from common.quantization.conversion import TensorError, quantize_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one sentence about what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m common.quantize", description=__doc__)
    parser.add_argument("source", type=Path, help="model directory in bf16, fp16, fp32 or FP8")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument(
        "--int8-lm-head", action="store_true", help="quantise lm_head too: smaller, and less exact logits"
    )
    options = parser.parse_args(arguments)
    try:
        errors = _quantize(options.source, options.target, options.int8_lm_head)
    except CheckpointError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 2
    except OSError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"{error.filename or options.target} cannot be written: {error.strerror}", markup=False
        )
        return 2
    Console().print(error_table(errors))
    return 0


@torch.inference_mode()
def _quantize(source: Path, target: Path, int8_lm_head: bool) -> list[TensorError]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("quantising", total=None)
        return quantize_checkpoint(
            source,
            target,
            lambda written, total: progress.update(task, completed=written, total=total),
            int8_lm_head,
        )


def error_table(errors: Sequence[TensorError]) -> Table:
    """Sum up the errors of tensors that differ in layer and expert alone."""
    groups: dict[str, list[float]] = {}
    for one in errors:
        groups.setdefault(one.group, []).append(one.relative_error)
    table = Table(title="|int8 weight - weight| / |weight|")
    table.add_column("tensors", overflow="fold")
    for heading in ("count", "mean", "max"):
        table.add_column(heading, justify="right")
    for group, own in groups.items():
        table.add_row(group, str(len(own)), f"{sum(own) / len(own):.4%}", f"{max(own):.4%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
