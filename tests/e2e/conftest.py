"""Checkpoints and fleets that the end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

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
