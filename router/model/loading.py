"""Fills the router's model from a checkpoint, one tensor at a time: everything but the routed experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import Checkpoint
from common.device import find_device
from common.errors import CheckpointError
from common.heap import release_freed_memory
from common.model_config import ModelConfig
from common.quantization.description import FLOAT, W8A8_DYNAMIC
from common.quantization.w8a8 import stored_names
from common.stored_weights import StoredWeights
from common.tensor_names import is_elsewhere, layer_id_of
from router.kernels import load_kernels
from router.model.deepseek import MLP, BiasedRMSNorm, DeepseekForCausalLM, RMSNorm
from router.model.fused_decode import fuse_decode
from router.model.int8_linear import READ_LINEAR, read_dynamic_mlp
from router.model.linear import Linear

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

READ_BY_ATTENTION = ".self_attn.kv_b_proj"
"""Where queries are moved into the latent space, attention multiplies with the weight's halves itself."""
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
MAX_NAMED = 3
"""Keys an error names; the rest it counts."""


def load_model(
    model_path: Path, dtype: str, device: str, on_progress: Callable[[int, int], None]
) -> DeepseekForCausalLM:
    """Build the router's part of the model in `model_path` and read its weights.

    Args:
        dtype: "auto" (what the checkpoint says), "float32" or "bfloat16".
        on_progress: called with the bytes read so far and in all.

    Raises:
        CheckpointError: a file, a tensor or a value of the checkpoint is missing or wrong.
    """
    config = ModelConfig.from_directory(model_path)
    weights = StoredWeights(model_path, config)
    # Parameters without memory: each gets its own when its tensor arrives, so nothing is ever held twice.
    with torch.device("meta"):
        model = DeepseekForCausalLM(config, load_kernels(device), resolve_dtype(config, dtype))
        _give_biases_to_norms(model, weights)
    parts = list(_parts(model, weights, torch.device(find_device(device).torch_type)))
    _check_names(weights.checkpoint, config, [name for part in parts for name in part.names])
    sizes = [sum(map(weights.checkpoint.num_bytes, part.names)) for part in parts]
    loaded = 0
    on_progress(loaded, sum(sizes))
    # A part is in memory twice while it is packed, as stored and as packed: the largest first, while there is
    # room that smaller ones will fill.
    for size, part in sorted(zip(sizes, parts, strict=True), key=itemgetter(0), reverse=True):
        part.read()
        release_freed_memory()
        loaded += size
        on_progress(loaded, sum(sizes))
    fuse_decode(model)
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Part:
    """What is read at once: stored tensors that belong together, and what puts them into the model."""

    names: tuple[str, ...]
    read: Callable[[], None]


def _give_biases_to_norms(model: nn.Module, weights: StoredWeights) -> None:
    """Replace the norms for which the checkpoint has a bias."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RMSNorm) and f"{weights.norm_path(path)}.bias" in weights.checkpoint:
            model.set_submodule(path, BiasedRMSNorm(module))


def _parts(model: nn.Module, weights: StoredWeights, device: torch.device) -> Iterator[_Part]:
    """Find the parts of the model; an MLP or a linear layer in int8 is one, any other parameter is one."""
    fused: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(fused):
            continue
        if isinstance(module, MLP) and _is_dynamic(weights, path):
            fused = (*fused, f"{path}.")
            yield _int8_mlp_part(model, path, module, weights, device)
            continue
        if isinstance(module, Linear) and (kind := weights.type_of(path)) != FLOAT:
            yield _int8_part(model, path, module, kind, weights, device)
            continue
        stored_path = weights.norm_path(path) if isinstance(module, RMSNorm) else path
        for leaf, parameter in module.named_parameters(recurse=False):
            names = weights.float_names(f"{stored_path}.{leaf}")
            replaced = () if stored_path == path else weights.present(f"{path}.{leaf}")
            read = partial(_read_parameter, module, leaf, parameter, names[0], weights, device)
            yield _Part((*names, *replaced), read)


def _is_dynamic(weights: StoredWeights, path: str) -> bool:
    return all(weights.type_of(f"{path}.{name}") == W8A8_DYNAMIC for name in MLP_LINEARS)


def _int8_mlp_part(
    model: nn.Module, path: str, mlp: MLP, weights: StoredWeights, device: torch.device
) -> _Part:
    linears = [f"{path}.{name}" for name in MLP_LINEARS]
    names = [name for one in linears for name in stored_names(weights.checkpoint, one, W8A8_DYNAMIC)]

    def read() -> None:
        model.set_submodule(path, read_dynamic_mlp(weights, path, mlp.gate_proj, device))

    return _Part(tuple(names), read)


def _int8_part(
    model: nn.Module, path: str, linear: Linear, kind: str, weights: StoredWeights, device: torch.device
) -> _Part:
    if path.endswith(READ_BY_ATTENTION):
        raise CheckpointError(
            f"{weights.checkpoint.directory}: {path}.weight is of type {kind}, but it must be {FLOAT}: "
            f"attention takes it apart"
        )
    names = [*stored_names(weights.checkpoint, path, kind)]
    if linear.bias is not None and kind == W8A8_DYNAMIC:
        names.append(f"{path}.bias")

    def read() -> None:
        model.set_submodule(path, READ_LINEAR[kind](weights, path, linear, device))

    return _Part(tuple(names), read)


def _read_parameter(
    module: nn.Module,
    leaf: str,
    parameter: Tensor,
    name: str,
    weights: StoredWeights,
    device: torch.device,
) -> None:
    tensor = weights.float_tensor(name, tuple(parameter.shape), parameter.dtype).to(device)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def resolve_dtype(config: ModelConfig, dtype: str) -> torch.dtype:
    """Return the dtype of weights and activations; "auto" is what the checkpoint says."""
    name = config.dtype_name if dtype == "auto" else dtype
    if name not in DTYPES:
        raise CheckpointError(
            f"the dtype of the checkpoint is {name!r}, but only float32 and bfloat16 are computed: "
            f"choose one of them with --dtype"
        )
    return DTYPES[name]


def _check_names(checkpoint: Checkpoint, config: ModelConfig, needed: Iterable[str]) -> None:
    """Name what the model needs and the checkpoint lacks, and what the checkpoint has and nobody needs."""
    wanted = dict.fromkeys(needed)
    missing = [name for name in wanted if name not in checkpoint]
    if missing:
        raise CheckpointError(f"{checkpoint.directory} lacks {_listed(missing)}, which config.json asks for")
    others = [name for name in checkpoint.names if name not in wanted]
    mtp = [name for name in others if layer_id_of(name) >= config.num_hidden_layers]
    if mtp:
        logger.info(
            "ignoring layers for multi-token prediction: first_layer_id=%d num_tensors=%d",
            config.num_hidden_layers,
            len(mtp),
        )
    ignored = {*mtp, *(name for name in others if is_elsewhere(name, config))}
    unexpected = [name for name in others if name not in ignored]
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.directory} holds {_listed(unexpected)}, which config.json does not account for"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
