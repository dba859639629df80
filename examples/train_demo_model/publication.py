"""Turns a finished run into a checkpoint directory in the published layout, measured and described."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer

from examples.train_demo_model.evaluation import evaluate, greedy_answer
from examples.train_demo_model.loss_curve import draw_loss_curve
from examples.train_demo_model.model import CONFIG, DemoModel, published_tensors
from examples.train_demo_model.model_card import DEMO_PROMPTS, Demo, Run, write_card
from examples.train_demo_model.tokenizer_training import write_tokenizer


def write_checkpoint(directory: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    """Write weights, configuration and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(published_tensors(model)), directory / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
    _write_json(directory / "config.json", CONFIG)
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **ids, "do_sample": False})
    write_tokenizer(directory, tokenizer, CONFIG["max_position_embeddings"])


def publish(
    directory: Path, model: DemoModel, tokenizer: Tokenizer, progress: dict[str, Any], machine: str
) -> None:
    """Write the checkpoint, measure what was written, and say so in evaluation.json and MODEL_CARD.md."""
    write_checkpoint(directory, model, tokenizer)
    losses = [entry["loss"] for entry in progress["history"]]
    (directory / "loss_curve.svg").write_text(draw_loss_curve(losses), encoding="utf-8")
    evaluation = evaluate(directory)
    demos = [Demo(prompt, greedy_answer(directory, prompt)) for prompt in DEMO_PROMPTS]
    measured = evaluation._asdict() | {"demos": [demo._asdict() for demo in demos]}
    _write_json(directory / "evaluation.json", measured)
    run = Run(progress["step"], progress["seconds"], machine, fmean(losses[-100:]))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = write_card(CONFIG, num_parameters, tokenizer.get_vocab_size(), run, evaluation, demos)
    (directory / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
