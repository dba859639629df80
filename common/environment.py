"""What other programs' variables of the environment say: MindIE's rank table, and CANN's buffers."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import ConfigError
from common.rank_table import RankTable, read_rank_table

RANK_TABLE_VARIABLE = "RANK_TABLE_FILE"
MODES_VARIABLE = "MINDIE_CHECK_INPUTFILES_PERMISSION"
BUFFER_VARIABLE = "HCCL_BUFFSIZE"


def rank_table_file() -> Path | None:
    """Where RANK_TABLE_FILE says that the rank table is; None where it says nothing."""
    name = os.environ.get(RANK_TABLE_VARIABLE, "")
    return Path(name) if name else None


def rank_table() -> RankTable | None:
    """The rank table of RANK_TABLE_FILE; None where that is not set.

    Raises:
        ConfigError: one sentence with the file, the place in it, the value found, and the rule.
    """
    file = rank_table_file()
    if file is None:
        return None
    return read_rank_table(file, check_mode=os.environ.get(MODES_VARIABLE, "") != "0")


def hccl_buffer_mb(device: str) -> int | None:
    """HCCL_BUFFSIZE, in MB; None where it is not set, and where `device` has no HCCL.

    Raises:
        ConfigError: it is no number of MB.
    """
    text = os.environ.get(BUFFER_VARIABLE, "").strip()
    if device != "npu" or not text:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"{BUFFER_VARIABLE} is {text[:40]!r}, but it must be a number of MB, at least 1: "
            "correct it or leave it out"
        )
    return int(text)
