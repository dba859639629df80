"""The routed experts that a worker has in memory, read from the checkpoint one by one.

Shapes: D hidden_size, F moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import CheckpointError
from common.heap import release_freed_memory
from common.model_config import ModelConfig
from common.quantization.description import FLOAT, W8A8_DYNAMIC
from common.quantization.w8a8 import read_dynamic
from common.stored_weights import StoredWeights
from common.weight_sizes import expert_bytes
from expert_worker.experts import LayerExperts
from expert_worker.kernels import ExpertKernels, PackedExperts, PackedInt8Experts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

RELEASE_BYTES = 1 << 26
"""Weights that are loaded between two returns of freed memory, which the next read would have used again."""

Expert = tuple[int, int]
"""layer_id, and the expert's index in the checkpoint."""


@dataclass(frozen=True, slots=True)
class ShardSource:
    """Where experts come from and what they become. `dtype` is "float32" or "bfloat16"."""

    model_path: Path
    dtype: str


class Shard:
    """Experts of one checkpoint. What a new epoch shares with the last one is not read again.

    Attributes:
        loaded_bytes: bytes of weights in memory.
    """

    def __init__(self, kernels: ExpertKernels, device: torch.device) -> None:
        self._kernels = kernels
        self._device = device
        self._source: ShardSource | None = None
        self._experts: dict[Expert, PackedExperts | PackedInt8Experts] = {}
        self._num_bytes: dict[Expert, int] = {}
        self._layers: dict[int, LayerExperts] = {}
        self._is_fused = False
        self.loaded_bytes = 0

    @property
    def device(self) -> str:
        """Where the experts are: "cpu", "cuda:0"."""
        return str(self._device)

    def holds(self, source: ShardSource, experts: Mapping[int, tuple[int, ...]]) -> bool:
        """Whether these experts, and no others, are in memory: `hold` would return at once."""
        return source == self._source and experts == {
            layer_id: layer.expert_ids for layer_id, layer in self._layers.items()
        }

    def hold(
        self,
        source: ShardSource,
        experts: Mapping[int, tuple[int, ...]],
        on_progress: Callable[[int, int], None],
    ) -> dict[int, LayerExperts]:
        """Read what is missing, let go of what is not wanted, and return the experts of each layer.

        Whoever still computes with experts that are let go keeps them alive until it is done.

        Args:
            source: the checkpoint; another one than before replaces everything.
            experts: layer_id -> checkpoint indices, in local order.
            on_progress: called with the bytes in memory and in all; what it raises ends the loading.

        Raises:
            CheckpointError: an expert is missing, or not of the shape config.json says.
        """
        if self.holds(source, experts):
            on_progress(self.loaded_bytes, self.loaded_bytes)
            return self._layers
        self._layers = {}
        reader = _ExpertReader(source, experts)
        self._let_go(set(reader.wanted) if source == self._source else set())
        self._source = source
        total = sum(reader.num_bytes(expert) for expert in reader.wanted)
        on_progress(self.loaded_bytes, total)
        unreleased = 0
        for expert in reader.wanted:
            if expert not in self._experts:
                self._experts[expert] = reader.read(expert, self._kernels, self._device)
                self._num_bytes[expert] = reader.num_bytes(expert)
                self.loaded_bytes += self._num_bytes[expert]
                unreleased += self._num_bytes[expert]
                if unreleased >= RELEASE_BYTES:
                    release_freed_memory()
                    unreleased = 0
                on_progress(self.loaded_bytes, total)
        release_freed_memory()
        layers = {layer_id: self._layer(layer_id, own) for layer_id, own in experts.items()}
        held = [layer for layer in layers.values() if layer.num_local_experts]
        self._is_fused = bool(held) and all(layer.is_fused for layer in held)
        self._layers = layers
        return layers

    def describe_grouped_matmul(self) -> str:
        """How the experts of a layer are run where fused calls are allowed, and why."""
        is_int8 = any(isinstance(packed, PackedInt8Experts) for packed in self._experts.values())
        name = "W8A8" if is_int8 else self._source.dtype if self._source is not None else "nothing"
        if self._is_fused:
            return f"one fused call for all experts of a layer: there is a kernel for {name}"
        return f"one product after another for each expert: there is no fused kernel for {name} here"

    def _layer(self, layer_id: int, own: tuple[int, ...]) -> LayerExperts:
        held = [self._experts[layer_id, expert] for expert in own]
        floats = [one for one in held if isinstance(one, PackedExperts)]
        int8s = [one for one in held if isinstance(one, PackedInt8Experts)]
        if floats and int8s:
            raise CheckpointError(
                f"layer {layer_id} has {len(floats)} experts in floating point and {len(int8s)} in int8 "
                f"on this worker, but all experts of a layer must be of one type"
            )
        packed: PackedExperts | PackedInt8Experts
        packed = self._kernels.join_int8(int8s) if int8s else self._kernels.join(floats)
        each: Iterator[PackedExperts | PackedInt8Experts] = packed.each()
        for expert, one in zip(own, each, strict=True):
            self._experts[layer_id, expert] = one
        return LayerExperts(own, packed, self._kernels)

    def _let_go(self, wanted: set[Expert]) -> None:
        for expert in self._experts.keys() - wanted:
            del self._experts[expert]
            self.loaded_bytes -= self._num_bytes.pop(expert)


class _ExpertReader:
    """Reads experts of a checkpoint: in floating point converted on the way, in int8 as they are."""

    def __init__(self, source: ShardSource, experts: Mapping[int, tuple[int, ...]]) -> None:
        if source.dtype not in DTYPES:
            raise CheckpointError(
                f"experts cannot be computed in {source.dtype!r}: choose float32 or bfloat16 with --dtype"
            )
        self._dtype = DTYPES[source.dtype]
        self._config = ModelConfig.from_directory(source.model_path)
        self._weights = StoredWeights(source.model_path, self._config)
        self.wanted = [(layer_id, expert) for layer_id, own in experts.items() for expert in own]
        for layer_id, expert in self.wanted:
            if layer_id not in self._config.moe_layer_ids or expert >= self._config.n_routed_experts:
                raise CheckpointError(
                    f"expert {expert} of layer {layer_id} was assigned to this worker, but "
                    f"{source.model_path} has {self._config.n_routed_experts} experts in layers "
                    f"{list(self._config.moe_layer_ids)}: give router and workers the same checkpoint"
                )

    def num_bytes(self, expert: Expert) -> int:
        """What the expert takes in memory."""
        return expert_bytes(self._config, self._type_of(expert), self._dtype.itemsize)

    def read(
        self, expert: Expert, kernels: ExpertKernels, device: torch.device
    ) -> PackedExperts | PackedInt8Experts:
        """Read gate_proj [F, D], up_proj [F, D] and down_proj [D, F] of one expert and pack them."""
        if self._type_of(expert) == FLOAT:
            gate, up, down = (
                self._weights.float_tensor(f"{path}.weight", shape, self._dtype).to(device)
                for path, shape in self._parts(expert)
            )
            return kernels.pack([gate], [up], [down])
        gate8, up8, down8 = (
            read_dynamic(self._weights.checkpoint, path, shape).to(device)
            for path, shape in self._parts(expert)
        )
        return kernels.pack_int8([gate8], [up8], [down8], self._dtype)

    def _type_of(self, expert: Expert) -> str:
        """Return the type that the three weights of an expert share: FLOAT or W8A8_DYNAMIC."""
        types = {path: self._weights.type_of(path) for path, _ in self._parts(expert)}
        (path, kind), *others = types.items()
        if kind not in (FLOAT, W8A8_DYNAMIC) or any(other != kind for _, other in others):
            raise CheckpointError(
                f"{self._weights.checkpoint.directory}: the weights of {path.rpartition('.')[0]} are "
                f"{', '.join(types.values())}, but those of an expert must all be {FLOAT} or {W8A8_DYNAMIC}"
            )
        return kind

    def _parts(self, expert: Expert) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield where the linear layers of an expert are, and the shapes of their weights."""
        hidden_size, intermediate = self._config.hidden_size, self._config.moe_intermediate_size
        prefix = f"model.layers.{expert[0]}.mlp.experts.{expert[1]}"
        yield f"{prefix}.gate_proj", (intermediate, hidden_size)
        yield f"{prefix}.up_proj", (intermediate, hidden_size)
        yield f"{prefix}.down_proj", (hidden_size, intermediate)
