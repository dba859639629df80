"""Who takes part in the comparison: expertmesh on several checkpoints, and the peers that are installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.serving import llama_cpp
from benchmarks.serving.fleet_speed import fleet_speeds
from benchmarks.serving.llama_cpp import llama_cpp_speeds
from benchmarks.serving.python_engine import ROOT, engine_speeds
from benchmarks.serving.touched_weights import TouchedWeights, q8_0_weights, stored_weights
from benchmarks.serving.workload import Speeds, Workload

ENGINE = "benchmarks.serving.{}_engine"


@dataclass(frozen=True, slots=True)
class Contender:
    """Somebody who can be measured.

    Attributes:
        key: for the command line and the file of results.
        title: for tables.
        is_ours: whether it is expertmesh.
        weights: what it reads and multiplies.
        arithmetic: what it multiplies in.
        measure: starts it, has it do the work, and ends it.
    """

    key: str
    title: str
    is_ours: bool
    weights: TouchedWeights
    arithmetic: Literal["int8", "bfloat16"]
    measure: Callable[[Workload], Speeds]


@dataclass(frozen=True, slots=True)
class Absent:
    """A peer that cannot be measured, and what would change that."""

    title: str
    way_out: str


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """One model three times: in bfloat16, and in W8A8 with lm_head in bfloat16 or in int8."""

    bfloat16: Path
    w8a8: Path
    w8a8_head: Path

    @classmethod
    def of(cls, folder: Path) -> Checkpoints:
        """Where they are in a folder."""
        return cls(folder / "v2-lite-shape", folder / "v2-lite-w8a8", folder / "v2-lite-w8a8-head")

    def make(self) -> None:
        """Make those that are not there yet: 14 GB in some minutes."""
        quantize = ("common.quantize", str(self.bfloat16))
        for directory, command in (
            (self.bfloat16, ("benchmarks.v2_lite_shape", str(self.bfloat16))),
            (self.w8a8, (*quantize, str(self.w8a8))),
            (self.w8a8_head, (*quantize, str(self.w8a8_head), "--int8-lm-head")),
        ):
            if not (directory / "config.json").exists():
                subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)


def ours(checkpoints: Checkpoints, ep_level: int) -> Iterator[Contender]:
    """Expertmesh with two workers, with lm_head in int8 or in bfloat16, and in one process."""
    for key, name, model, workers in (
        ("two-workers", "router + 2 workers, W8A8", checkpoints.w8a8_head, 2),
        ("loopback", "loopback, W8A8", checkpoints.w8a8_head, 0),
        ("two-workers-bf16-head", "router + 2 workers, W8A8, lm_head bf16", checkpoints.w8a8, 2),
    ):
        measure = partial(fleet_speeds, model, workers, ep_level)
        yield Contender(key, f"expertmesh: {name}", True, stored_weights(model), "int8", measure)


def llama_cpp_peer(checkpoints: Checkpoints, binaries: Path | None, gguf: Path | None) -> Contender | Absent:
    """llama.cpp, if both its programs and its file are there."""
    title = "llama.cpp, Q8_0"
    if binaries is None or gguf is None:
        return Absent(title, "give --llama-cpp, the folder of its programs, and --gguf, the model for it")
    for file in (gguf, *(binaries / name for name in llama_cpp.PROGRAMS)):
        if not file.is_file():
            return Absent(title, f"{file} is not there")
    measure = partial(llama_cpp_speeds, binaries, gguf)
    return Contender("llama.cpp", title, False, q8_0_weights(checkpoints.bfloat16), "int8", measure)


def python_peer(
    checkpoints: Checkpoints, library: str, python: Path | None, way_out: str
) -> Contender | Absent:
    """A peer that is a Python library, if there is an interpreter and it has the library."""
    title = f"{library}, bfloat16"
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({library!r}) is None)"
    if python is None or subprocess.run([python, "-c", look], check=False).returncode != 0:
        return Absent(title, way_out)
    measure = partial(engine_speeds, python, ENGINE.format(library), checkpoints.bfloat16)
    weights = stored_weights(checkpoints.bfloat16)
    return Contender(library, title, False, weights, "bfloat16", measure)
