"""Variables that MindIE and CANN read too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.environment import hccl_buffer_mb, rank_table
from common.errors import ConfigError
from common.rank_table import parse_rank_table
from tests.common.test_rank_table import table


def test_the_rank_table_is_the_one_that_the_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in ("", None):
        monkeypatch.delenv("RANK_TABLE_FILE", raising=False)
        if absent is not None:
            monkeypatch.setenv("RANK_TABLE_FILE", absent)
        assert rank_table() is None
    file = tmp_path / "ranktable.json"
    file.write_text(json.dumps(table()))
    file.chmod(0o644)
    monkeypatch.setenv("RANK_TABLE_FILE", str(file))
    with pytest.raises(ConfigError, match="chmod 640"):
        rank_table()
    monkeypatch.setenv("MINDIE_CHECK_INPUTFILES_PERMISSION", "0")
    assert rank_table() == parse_rank_table(table())


@pytest.mark.parametrize(("text", "number"), [("", None), ("  ", None), ("900", 900), (" 1 ", 1)])
def test_the_buffer_of_hccl_is_a_number_of_megabytes(
    monkeypatch: pytest.MonkeyPatch, text: str, number: int | None
) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", text)
    assert hccl_buffer_mb("npu") == number
    assert hccl_buffer_mb("cpu") is None


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "\u0662", "9" * 99 + "x"])
def test_a_buffer_that_is_no_number_is_refused_where_it_matters(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", text)
    assert hccl_buffer_mb("cpu") is None
    with pytest.raises(ConfigError, match=r"^HCCL_BUFFSIZE is '.*', but it must be a number of MB"):
        hccl_buffer_mb("npu")
