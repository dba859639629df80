"""How many tokens chose each routed expert: counted by a router, or read from a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from common.json_file import read_json, shown, shown_path
from common.placement import Placement

MOST_TOKENS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """Tokens per expert.

    Attributes:
        layers: of every MoE layer, layer_id -> [E] tokens per expert, none negative.
    """

    layers: Mapping[int, tuple[int, ...]]


def uniform(n_routed_experts: int, moe_layer_ids: Iterable[int]) -> ExpertLoads:
    """The loads to plan with before there are any: the same for all experts."""
    return ExpertLoads(dict.fromkeys(moe_layer_ids, (1,) * n_routed_experts))


def read_loads(path: Path, n_routed_experts: int, moe_layer_ids: Collection[int]) -> ExpertLoads:
    """Read `{"layers": {"3": [tokens of expert 0, tokens of expert 1, ...], ...}}`.

    Raises:
        ConfigError: one sentence with the file, the place in it, the value found, and the rule.
    """
    where = shown_path(path)
    document = read_json(path)
    if not isinstance(document, dict) or "layers" not in document:
        raise ConfigError(
            f"{where} is {shown(document)} without the key layers, but must hold "
            '{"layers": {"<layer>": [tokens per expert]}}: write it so'
        )
    for name in document:
        if name != "layers":
            raise ConfigError(f"{where} has the key {shown(name)}, but layers is the only one: leave it out")
    layers = document["layers"]
    if not isinstance(layers, dict):
        raise ConfigError(
            f"{where}: layers is {shown(layers)}, but must be an object: give every MoE layer a list"
        )
    expected = {str(layer_id): layer_id for layer_id in moe_layer_ids}
    for name in layers:
        if name not in expected:
            raise ConfigError(
                f"{where}: layers has the key {shown(name)}, but the checkpoint's MoE layers are "
                f"{_range(expected.values())}: leave it out"
            )
    for name in expected:
        if name not in layers:
            raise ConfigError(
                f"{where}: layers has no key {shown(name)}, but every MoE layer has one: add it"
            )
    return ExpertLoads(
        {
            layer_id: _tokens(layers[name], f"{where}: layers.{name}", n_routed_experts)
            for name, layer_id in expected.items()
        }
    )


def worker_loads(placement: Placement, loads: ExpertLoads) -> dict[int, tuple[float, ...]]:
    """Tokens per worker, [W] of each layer, when the replicas of an expert share its tokens equally."""
    found = {}
    for layer_id, shares in placement.layers.items():
        tokens, replicas = loads.layers[layer_id], placement.replicas_of(layer_id)
        found[layer_id] = tuple(
            sum(tokens[expert] / len(replicas[expert]) for expert in experts) for experts in shares
        )
    return found


def balancedness(placement: Placement, loads: ExpertLoads) -> dict[int, float]:
    """Of each layer, the mean worker's load over the heaviest one's: 1 is perfect, and no load is too."""
    return {
        layer_id: sum(totals) / len(totals) / max(totals) if max(totals) > 0 else 1.0
        for layer_id, totals in worker_loads(placement, loads).items()
    }


def _tokens(value: object, where: str, n_routed_experts: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != n_routed_experts:
        raise ConfigError(
            f"{where} is {shown(value)}, but must be a list with one entry for each of the "
            f"{n_routed_experts} routed experts: count again with this checkpoint"
        )
    for expert, tokens in enumerate(value):
        # A boolean is an int to Python, and no count.
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 <= tokens <= MOST_TOKENS:
            raise ConfigError(
                f"{where}[{expert}] is {shown(tokens)}, but must be a number of tokens: write an integer "
                f"from 0 to {MOST_TOKENS}"
            )
    return tuple(value)


def _range(layer_ids: Collection[int]) -> str:
    return f"{min(layer_ids)} to {max(layer_ids)}" if layer_ids else "none"
