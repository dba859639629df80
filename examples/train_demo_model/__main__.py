"""Trains the demo model: python -m examples.train_demo_model [--steps N] [--folder FOLDER].

Interrupt it whenever you like: the same command goes on from where it last saved, and draws the same batches.
When it is done, examples/demo_model holds the checkpoint, its model card and the curve of its loss.
The card says how its W8A8 version is made.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.optim import AdamW

from examples.train_demo_model.corpus import FIRST_KINDS, LAST_KINDS, LATER_KINDS, draw_batch, draw_texts
from examples.train_demo_model.model import CONFIG, DemoModel
from examples.train_demo_model.publication import publish
from examples.train_demo_model.tokenizer_training import train_tokenizer
from examples.train_demo_model.training_state import load_state, save_state

SEED = 2024
ROWS, LENGTH = 16, 256
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.4
"""The learning rate falls to 0 in this last share of the steps."""
CURRICULUM = ((0, FIRST_KINDS), (370, LATER_KINDS), (1240, LAST_KINDS))
"""From which step on which text is drawn."""
BIAS_SPEED = 1e-3
"""How far the gate's bias moves in a step; DeepSeek-V3 took the same, and 0 towards the end."""
SAVE_EVERY_S = 90.0
TOKENIZER_TEXTS = 40_000


def learning_rate(step: int, num_steps: int) -> float:
    """Rise, stay, fall to 0."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = min(1.0, (num_steps - step) / (DECAY_SHARE * num_steps))
    return PEAK_LEARNING_RATE * rise * fall


def given_tokenizer(folder: Path) -> Tokenizer:
    """Return the run's tokenizer, trained if this is its beginning."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(draw_texts(f"{SEED} tokenizer", TOKENIZER_TEXTS), CONFIG["vocab_size"]).save(
            str(file)
        )
    return Tokenizer.from_file(str(file))


def given_optimizer(model: DemoModel) -> AdamW:
    """Return AdamW, with weight decay for matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def take_step(
    model: DemoModel, optimizer: AdamW, tokenizer: Tokenizer, step: int, num_steps: int
) -> dict[str, float]:
    """Learn from the batch of this step; return what happened."""
    kinds = next(kinds for first, kinds in reversed(CURRICULUM) if step >= first)
    batch = draw_batch(tokenizer, f"{SEED} step {step}", ROWS, LENGTH, kinds)
    rate = learning_rate(step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = model(batch.input_ids, batch.document_ids, batch.learned)
    loss = F.cross_entropy(logits, batch.next_ids[batch.learned])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    speed = BIAS_SPEED if step < 0.9 * num_steps else 0.0
    imbalance = max(gate.balance(speed) for gate in model.gates().values())
    return {"step": step, "loss": loss.item(), "imbalance": imbalance, "learning_rate": rate}


def steps_with_progress(first: int, num_steps: int, seen: dict[str, float]) -> Iterator[int]:
    """Yield the steps and show how far the run is; `seen` is what the last step reported."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  busiest expert {task.fields[imbalance]:.2f} x mean"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(
            "", total=num_steps, completed=first, loss=float("nan"), imbalance=float("nan")
        )
        for step in range(first, num_steps):
            yield step
            progress.update(task, completed=step + 1, loss=seen["loss"], imbalance=seen["imbalance"])


def train(folder: Path, num_steps: int) -> tuple[DemoModel, Tokenizer, dict[str, Any]]:
    """Train, or go on training, until `num_steps` steps are done."""
    torch.manual_seed(SEED)
    tokenizer = given_tokenizer(folder)
    model = DemoModel(CONFIG)
    optimizer = given_optimizer(model)
    progress = load_state(folder, model, optimizer) or {"step": 0, "seconds": 0.0, "history": []}
    started = saved = time.monotonic()
    before, seen = progress["seconds"], {"loss": 0.0, "imbalance": 0.0}
    for step in steps_with_progress(progress["step"], num_steps, seen):
        seen |= take_step(model, optimizer, tokenizer, step, num_steps)
        progress["history"].append(dict(seen))
        progress |= {"step": step + 1, "seconds": before + time.monotonic() - started}
        if time.monotonic() - saved > SAVE_EVERY_S or step + 1 == num_steps:
            save_state(folder, model, optimizer, progress)
            saved = time.monotonic()
    return model, tokenizer, progress


def machine(num_threads: int) -> str:
    """Say what the run is computed on."""
    threads = "one thread" if num_threads == 1 else f"{num_threads} threads"
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{threads} of a CPU ({kind}) with torch {torch.__version__}"


def main() -> None:
    """Read the command line, train, publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/demo_model"), help="where the run is kept"
    )
    parser.add_argument(
        "--target", type=Path, default=Path("examples/demo_model"), help="where the result goes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, progress = train(arguments.folder, arguments.steps)
    publish(arguments.target, model, tokenizer, progress, machine(arguments.threads))
    history = arguments.folder / "history.json"
    history.write_text(json.dumps(progress["history"]), encoding="utf-8")


if __name__ == "__main__":
    main()
