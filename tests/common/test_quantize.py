"""`python -m common.quantize`: what it writes, how far it is from the source, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint_writer import CheckpointWriter, PlannedTensor
from common.errors import CheckpointError
from common.quantization.conversion import TensorError, quantize_checkpoint
from common.quantize import main
from tests.quantized_checkpoint import read_tensors, write_float, write_fp8, write_trained_like
from tests.router.driver import Driver, random_prompts
from tests.tiny_checkpoint import write_checkpoint

VOCAB_SIZE = 256
FORMATS = ("bfloat16", "float16", "float32", "fp8")
PRINTED = (
    *("mlp.gate_proj", "mlp.shared_experts.up_proj", "mlp.experts.*.down_proj", "lm_head"),
    *("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"),
)


def write_source(directory: Path, stored: str = "bfloat16", **overrides: Any) -> Path:
    dtype = "float32" if stored == "float32" else "bfloat16"
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 3, **overrides}
    write_checkpoint(directory / "random", "v3", torch_dtype=dtype, **sizes)
    write_trained_like(directory / "random", directory / "floats")
    if stored == "fp8":
        write_fp8(directory / "floats", directory / "fp8", block_size=(48, 32))
        return directory / "fp8"
    if stored == "float16":
        file = directory / "floats" / "model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    return directory / "floats"


def quantize(source: Path, target: Path, **options: Any) -> list[TensorError]:
    return quantize_checkpoint(source, target, lambda *_: None, **options)


def types(directory: Path) -> dict[str, str]:
    described: dict[str, str] = json.loads((directory / "quant_model_description.json").read_text())
    return described


@pytest.mark.parametrize("stored", FORMATS)
def test_int8_weights_are_those_numpy_makes_of_every_row(tmp_path: Path, stored: str) -> None:
    source = write_source(tmp_path, stored)
    errors = {one.name: one.relative_error for one in quantize(source, tmp_path / "w8a8")}
    write_float(source, tmp_path / "plain")
    plain, written = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "w8a8")
    described = types(tmp_path / "w8a8")
    assert set(written) == {name for name in described if name.startswith(("model.", "lm_head."))}
    int8 = [name for name in plain if described[name] == "W8A8_DYNAMIC"]
    assert set(int8) == errors.keys()
    assert len(int8) == 3 * 4 + 3 + 2 * (16 * 3 + 3)
    for name in int8:
        weight = plain[name].numpy()
        scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
        expected = np.rint(weight / scale)
        assert np.array_equal(written[name].numpy(), expected.astype(np.int8)), name
        assert np.array_equal(written[f"{name}_scale"].numpy(), scale)
        assert not written[f"{name}_offset"].any()
        error = np.linalg.norm(expected * scale - weight) / np.linalg.norm(weight)
        assert errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("stored", FORMATS)
def test_everything_else_is_kept_bit_for_bit_and_fp8_becomes_the_dtype_of_the_model(
    tmp_path: Path, stored: str
) -> None:
    source = write_source(tmp_path, stored)
    quantize(source, tmp_path / "w8a8")
    written, before = read_tensors(tmp_path / "w8a8"), read_tensors(source)
    kept = [name for name, kind in types(tmp_path / "w8a8").items() if kind == "FLOAT"]
    wanted = ("embed_tokens", "lm_head", "norm", "gate", "e_score_correction_bias", "kv_b_proj")
    assert all(any(word in name for word in wanted) for name in kept)
    for name in kept:
        if before[name].dtype == torch.float8_e4m3fn:
            assert written[name].dtype == torch.bfloat16
        else:
            assert torch.equal(written[name], before[name]), name


def logits(directory: Path) -> Tensor:
    driver = Driver(directory, dtype="float32")
    prompts = random_prompts((1, 9, 40, 100), VOCAB_SIZE)
    return driver.finish(*(driver.sequence(prompt) for prompt in prompts))


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("int8_lm_head", [False, True], ids=["float-lm-head", "int8-lm-head"])
def test_the_quantised_model_answers_like_its_source(tmp_path: Path, stored: str, int8_lm_head: bool) -> None:
    source = write_source(tmp_path, stored)
    quantize(source, tmp_path / "w8a8", int8_lm_head=int8_lm_head)
    assert types(tmp_path / "w8a8")["lm_head.weight"] == ("W8A8_DYNAMIC" if int8_lm_head else "FLOAT")
    expected = logits(source)
    error = float((logits(tmp_path / "w8a8") - expected).norm() / expected.norm())
    assert 1e-3 < error < 3e-2  # weights and rows are rounded to 255 steps: about 2e-2 together


def test_files_keep_to_their_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    source = write_source(tmp_path)
    quantize(source, tmp_path / "w8a8", max_file_bytes=50_000)
    files = sorted((tmp_path / "w8a8").glob("*.safetensors"))
    assert files[0].name == f"quant_model_weight_w8a8_dynamic-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    index = json.loads(
        (tmp_path / "w8a8" / "quant_model_weight_w8a8_dynamic.safetensors.index.json").read_text()
    )
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 50_000
    assert torch.equal(logits(tmp_path / "w8a8"), logits_in_one_file(source, tmp_path / "one"))


def logits_in_one_file(source: Path, target: Path) -> Tensor:
    quantize(source, target)
    return logits(target)


def test_config_says_what_was_done_and_companions_come_along_but_no_code(tmp_path: Path) -> None:
    source = write_source(tmp_path, "fp8", mtp_layers=1)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_deepseek.py").write_text("")
    (source / "LICENSE-MODEL").write_text("")
    quantize(source, tmp_path / "w8a8")
    before, after = (
        json.loads((directory / "config.json").read_text()) for directory in (source, tmp_path / "w8a8")
    )
    del before["quantization_config"]
    keys = ("quantize", "mla_quantize", "mtp_quantize")
    assert after == before | dict.fromkeys(keys, "w8a8_dynamic")
    others = {file.name for file in (tmp_path / "w8a8").iterdir() if not file.name.startswith("quant_model")}
    assert others == {"config.json", "generation_config.json", "tokenizer.json", "LICENSE-MODEL"}
    assert types(tmp_path / "w8a8")["model.layers.3.eh_proj.weight"] == "FLOAT"
    assert types(tmp_path / "w8a8")["model.layers.3.mlp.experts.0.up_proj.weight"] == "W8A8_DYNAMIC"


def test_what_was_interrupted_cannot_be_taken_for_a_checkpoint(tmp_path: Path) -> None:
    def stop(written: int, total: int) -> None:
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(write_source(tmp_path), tmp_path / "w8a8", stop)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Driver(tmp_path / "w8a8")


def test_progress_reaches_the_bytes_that_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize_checkpoint(write_source(tmp_path), tmp_path / "w8a8", lambda *amounts: seen.append(amounts))
    total = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "w8a8").values())
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert seen == sorted(seen)


UP_PROJ = "model.layers.1.mlp.experts.3.up_proj.weight"


def spoil(source: Path, target: Path) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors[UP_PROJ][2, 3] = float("inf")
    save_file(tensors, file)


def make_int8(source: Path, target: Path) -> None:
    file = source / "model.safetensors"
    save_file(load_file(file) | {UP_PROJ: torch.ones(32, 64, dtype=torch.int8)}, file)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda source, target: target.write_text(""), "w8a8 exists and is not an empty directory"),
        (quantize, "w8a8 exists and is not an empty directory"),
        (
            lambda source, target: (source / "quant_model_description.json").write_text("{}"),
            "floats is quantised already",
        ),
        (lambda source, target: (source / "config.json").unlink(), "config.json is missing"),
        (spoil, f"floats/model.safetensors: {UP_PROJ} holds a number that is not finite"),
        (
            make_int8,
            f"floats/model.safetensors: {UP_PROJ} is stored in torch.int8, but it must be in floating",
        ),
    ],
    ids=["file", "full", "already", "config", "infinite", "int8"],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path, Path], object],
    sentence: str,
) -> None:
    source = write_source(tmp_path)
    prepare(source, tmp_path / "w8a8")
    assert main([str(source), str(tmp_path / "w8a8")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in printed


def test_the_command_prints_the_error_of_every_kind_of_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_source(tmp_path)), str(tmp_path / "w8a8"), "--int8-lm-head"]) == 0
    printed = capsys.readouterr().out
    for name in PRINTED:
        assert f" {name}.weight" in printed
    assert Driver(tmp_path / "w8a8").config.dtype_name == "bfloat16"


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "moe_intermediate_size": 512, "n_routed_experts": 24, "num_hidden_layers": 3}
    write_checkpoint(tmp_path / "bf16", "v3", vocab_size=VOCAB_SIZE, num_shards=1, **sizes)  # type: ignore[arg-type]
    script = (
        "import resource, sys; from pathlib import Path; import common.quantize as q\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); q.quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), lambda *_: None)\n"
        "sys.stdout.write(str((peak() - before) * 1024))"
    )
    grown = int(
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "bf16"), str(tmp_path / "w8a8")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert grown < (tmp_path / "bf16" / "model.safetensors").stat().st_size // 4


def test_a_file_of_planned_tensors_is_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(5, dtype=torch.int8),
        "wide": torch.randn(3, 7),
        "half": torch.randn(3).bfloat16(),
        "nothing": torch.empty(0, 4),
    }
    planned = [PlannedTensor(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
    with CheckpointWriter(tmp_path / "a.safetensors", planned) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


def test_a_file_that_is_not_what_was_planned_is_an_error(tmp_path: Path) -> None:
    planned = [PlannedTensor("a", torch.float32, (2,)), PlannedTensor("b", torch.float32, (2,))]
    with pytest.raises(CheckpointError, match=r"x\.safetensors lacks b, which its header announces"):  # noqa: SIM117
        with CheckpointWriter(tmp_path / "x.safetensors", planned) as writer:
            writer.write("a", torch.ones(2))
    with CheckpointWriter(tmp_path / "y.safetensors", planned) as writer:
        writer.write("a", torch.ones(2))
        with pytest.raises(CheckpointError, match=r"a is torch\.float32 of shape"):
            writer.write("a", torch.ones(2))
        with pytest.raises(CheckpointError, match=r"b is torch\.int8 of shape \[2\], but the plan"):
            writer.write("b", torch.ones(2, dtype=torch.int8))
        writer._places.clear()
