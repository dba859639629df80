"""What a training run keeps on disk, so that it can go on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW

from examples.train_demo_model.model import DemoModel

STATE_FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(folder: Path, model: DemoModel, optimizer: AdamW, progress: dict[str, Any]) -> None:
    """Write weights, moments and `progress` as one file, which replaces the last one at once."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    partial = folder / f"{STATE_FILE}.partial"
    save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
    partial.replace(folder / STATE_FILE)


def load_state(folder: Path, model: DemoModel, optimizer: AdamW) -> dict[str, Any] | None:
    """Restore what save_state wrote; return its `progress`, or None where there is nothing to go on with."""
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        progress: dict[str, Any] = json.loads(stored.metadata()["progress"])
        names = set(stored.keys())
        model.load_state_dict(
            {name[6:]: stored.get_tensor(name) for name in names if name.startswith("model/")}
        )
        for name, parameter in model.named_parameters():
            state = {
                moment: stored.get_tensor(f"{moment}/{name}")
                for moment in MOMENTS
                if f"{moment}/{name}" in names
            }
            if state:
                step = parameter.new_tensor(float(progress["step"]))
                optimizer.state[parameter] = {"step": step, **state}
    return progress
