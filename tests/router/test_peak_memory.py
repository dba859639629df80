"""What the router's engine holds beside its weights: while it loads, in a step, and in a cache half full.

Each measurement has a process of its own: a peak begins with it, and memory that others freed is used
again. Shapes: T tokens, D hidden_size, F intermediate_size.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import native_library
from common.quantize import main as quantize
from router.kernels.cpu import MLP_ELEMENTS
from tests.tiny_checkpoint import write_checkpoint

NUM_TOKENS = 512
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 16384
WORKSPACE_OF_64_ROWS = 64 * INTERMEDIATE_SIZE * 10
VOCAB_SIZE = 32768
TIMEOUT_S = 120

MEASURE = """
import sys
from pathlib import Path
import psutil, torch
torch.set_num_threads(2)

def held():
    return psutil.Process().memory_info().rss

def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")

def peak():
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
"""

LOAD = """
from router.model.loading import load_model
load_model(Path(sys.argv[1]), "auto", "cpu", lambda loaded, total: None)  # code and buffers are there now
before = held()
forget_peak()
sizes = []
model = load_model(Path(sys.argv[2]), "auto", "cpu", lambda loaded, total: sizes.append(total))
print(peak() - before, sizes[-1])
"""

STEP = """
from tests.router.driver import Driver, random_prompts
driver = Driver(Path(sys.argv[1]), num_blocks=64)
few, many = random_prompts((20, int(sys.argv[2])), 128)
driver.finish(driver.sequence(few))
before = held()
forget_peak()
driver.finish(driver.sequence(many))
print(peak() - before)
"""

CACHE = """
from common.model_config import ModelConfig
from router.model.latent_cache import LatentCache
config = ModelConfig.from_directory(Path(sys.argv[1]))
cache = LatentCache(config, 64, 4096, torch.float32, "cpu")
before = held()
for layer_id in range(config.num_hidden_layers):
    cache.layer(layer_id)[:, :16] = 1
print(held() - before)
"""


def measure(script: str, *arguments: object) -> list[int]:
    """The numbers that a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + script, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return [int(number) for number in done.stdout.split()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose dense layer is far wider than anything else."""
    directory = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE, "num_hidden_layers": 2}
    write_checkpoint(directory / "bf16", "v2", vocab_size=128, **sizes)  # type: ignore[arg-type]
    quantize([str(directory / "bf16"), str(directory / "w8a8")])
    return directory


@pytest.mark.parametrize("name", ["bf16", "w8a8"])
def test_a_wide_mlp_does_not_hold_all_its_activations_at_once(wide: Path, name: str) -> None:
    if name == "w8a8" and (why := native_library.why_unavailable()):
        pytest.skip(why)
    (grown,) = measure(STEP, wide / name, NUM_TOKENS)
    # All rows at once have three of [T, F] in bfloat16, or two in float32 and two in int8: 48 or 80 MiB.
    weight = INTERMEDIATE_SIZE * HIDDEN_SIZE * 2  # oneDNN lays one out anew for a product, and may two
    activations = 3 * MLP_ELEMENTS * 2 + 2 * weight if name == "bf16" else WORKSPACE_OF_64_ROWS
    # Beside them rows of [T, D]: the residual, what attention makes of it, replies.
    assert grown < activations + 32 * NUM_TOKENS * HIDDEN_SIZE * 2


def test_loading_never_holds_much_more_than_the_weights(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_hidden_layers": 7,
        "first_k_dense_replace": 6,
    }
    write_checkpoint(tmp_path / "bf16", "v3", vocab_size=VOCAB_SIZE, **sizes)  # type: ignore[arg-type]
    quantize([str(tmp_path / "bf16"), str(tmp_path / "w8a8"), "--int8-lm-head"])
    write_checkpoint(tmp_path / "small", "v3", vocab_size=128)
    quantize([str(tmp_path / "small"), str(tmp_path / "first"), "--int8-lm-head"])
    grown, weights = measure(LOAD, tmp_path / "first", tmp_path / "w8a8")
    # lm_head is a fifth of them, and would be too much where it is packed beside all others.
    assert grown < 1.12 * weights


def test_the_cache_holds_what_was_written_to_it_and_not_whole_blocks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2", vocab_size=128)
    (grown,) = measure(CACHE, tmp_path)
    written = 4 * 64 * 16 * (32 + 16) * 4  # layers, blocks, tokens, C + R, float32
    pages = 4 * 64 * 4096  # of each block one begins before it, or ends behind it
    assert grown < 2 * (written + pages)
