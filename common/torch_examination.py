"""`python -m common.torch_examination`: what only a process with torch can say of this machine, for `doctor`.

One JSON object per line and subject, written at once: what a crash or a deadline cuts off is the rest alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import ExpertMeshError
from common.model_config import ModelConfig

Answer = dict[str, Any]
TORCH = "torch"
MOST_MISSING = 3
"""Names of missing tensors that are told; the rest is counted."""


def examine_torch() -> Answer:
    """Import torch: its version, the accelerator it was built for, and how long it took."""
    began_s = time.monotonic()
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "import_s": round(time.monotonic() - began_s, 1),
    }


def examine_backends(data_address: str) -> Answer:
    """What torch.distributed was built with, and whether Gloo works on `data_address`."""
    from common.process_group import built_backends, gloo_device, open_store

    open_store(data_address)
    gloo_device(data_address)
    return {"built": list(built_backends())}


def examine_native() -> Answer:
    """Whether the native kernels were built, and which paths through them this processor takes."""
    from common.native_library import available_paths, why_unavailable

    reason = why_unavailable()
    return {"error": reason} if reason is not None else {"paths": list(available_paths())}


def examine_cuda() -> Answer:
    """The GPUs that torch reaches, and what it complains of where it reaches none."""
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    complaint = _first_line(str(complaints[0].message)) if complaints else ""
    return {"is_available": is_available, "names": names if is_available else [], "complaint": complaint}


def examine_npu() -> Answer:
    """The NPUs that torch_npu reaches."""
    try:
        version = importlib.metadata.version("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        return {"is_installed": False}
    import torch
    import torch_npu  # noqa: F401 - it adds torch.npu

    npu = torch.get_device_module("npu")
    is_available = bool(npu.is_available())
    count = npu.device_count() if is_available else 0
    return {"is_installed": True, "version": version, "is_available": is_available, "count": count}


def examine_checkpoint(directory: Path) -> Answer:
    """Read the headers of all shards, and look for every tensor without which the model cannot be loaded."""
    from common.checkpoint import Checkpoint

    checkpoint = Checkpoint(directory)
    missing = [
        name for name in needed_tensors(ModelConfig.from_directory(directory)) if name not in checkpoint
    ]
    return {
        "num_tensors": len(checkpoint.names),
        "num_files": len({checkpoint.file(name) for name in checkpoint.names}),
        "num_bytes": sum(checkpoint.num_bytes(name) for name in checkpoint.names),
        "missing": missing[:MOST_MISSING],
        "num_missing": len(missing),
    }


def needed_tensors(config: ModelConfig) -> Iterator[str]:
    """One tensor of every part of the model that may lie in a file of its own."""
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight"
    moe_layer_ids = set(config.moe_layer_ids)
    for layer_id in range(config.num_hidden_layers):
        layer = f"model.layers.{layer_id}"
        yield from (f"{layer}.input_layernorm.weight", f"{layer}.self_attn.o_proj.weight")
        if layer_id not in moe_layer_ids:
            yield f"{layer}.mlp.down_proj.weight"
            continue
        yield f"{layer}.mlp.gate.weight"
        for expert in range(config.n_routed_experts):
            yield f"{layer}.mlp.experts.{expert}.gate_proj.weight"
            yield f"{layer}.mlp.experts.{expert}.down_proj.weight"


def _answers(examinations: Iterable[tuple[str, Callable[[], Answer]]]) -> Iterator[tuple[str, Answer]]:
    for subject, examination in examinations:
        try:
            yield subject, examination()
        except ExpertMeshError as error:
            yield subject, {"error": str(error)}
        except Exception as error:  # whatever a broken installation raises is what was asked for
            yield subject, {"error": _sentence(error)}
            if subject == TORCH:
                return  # half of it is loaded now, and what the rest would say is about that


def _sentence(error: BaseException) -> str:
    """What an error says, and what caused it: torch wraps what goes wrong in an extension."""
    own = _first_line(f"{type(error).__name__}: {error}")
    return own if error.__cause__ is None else f"{own} ({_sentence(error.__cause__)})"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def main() -> int:
    """Examine and write one line for each subject; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m common.torch_examination", description=__doc__)
    parser.add_argument("--data-address", default="127.0.0.1", help="an address of this machine")
    parser.add_argument("--model", type=Path, help="directory of a checkpoint")
    arguments = parser.parse_args()
    examinations: list[tuple[str, Callable[[], Answer]]] = [
        (TORCH, examine_torch),
        ("backends", lambda: examine_backends(arguments.data_address)),
        ("native", examine_native),
        ("cuda", examine_cuda),
    ]
    if arguments.model is not None:
        examinations.append(("checkpoint", lambda: examine_checkpoint(arguments.model)))
    # Last, since a driver that is half installed may end the process.
    examinations.append(("npu", examine_npu))
    for subject, answer in _answers(examinations):
        sys.stdout.write(json.dumps({subject: answer}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
