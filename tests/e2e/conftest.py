"""Checkpoints and fleets that the end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.quantize import main as quantize_main
from tests.tiny_checkpoint import write_checkpoint

NUM_EXPERTS = 24
"""1, 2, 3, 4 and 8 workers divide them."""


@pytest.fixture(scope="session")
def v3_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint with DeepSeek-V3's architecture and the real tokenizer."""
    directory = tmp_path_factory.mktemp("v3")
    write_checkpoint(directory, family="v3", n_routed_experts=NUM_EXPERTS)
    return directory


@pytest.fixture(scope="session")
def v2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint with DeepSeek-V2's architecture and the real tokenizer."""
    directory = tmp_path_factory.mktemp("v2")
    write_checkpoint(directory, family="v2", n_routed_experts=NUM_EXPERTS)
    return directory


@pytest.fixture(scope="session")
def w8a8_model(v3_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of them in W8A8: at ep_level 2 its rows are int8, which native code writes and answers."""
    directory = tmp_path_factory.mktemp("quantised") / "w8a8"
    assert quantize_main([str(v3_model), str(directory)]) == 0
    return directory
