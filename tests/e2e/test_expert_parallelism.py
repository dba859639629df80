"""The parameters of expert parallelism in a real fleet: they act, are counted, and change no answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common import native_bf16
from common.quantize import main as quantize_main
from tests.e2e.fleet import Fleet, command, fleet_of, generate

pytestmark = pytest.mark.e2e

LONG_PROMPT = [100 + 7919 * i % 100000 for i in range(300)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}


def configuration(folder: Path, parameters: dict[str, Any], **own: Any) -> str:
    file = folder / "config.json"
    model = {"models": {"deepseekv2": parameters}}
    file.write_text(json.dumps({"ModelDeployConfig": {"ModelConfig": [model]}, "ExpertMesh": own}))
    return str(file)


def answer_of(fleet: Fleet) -> tuple[list[int], list[float]]:
    answer = generate(fleet, LONG_PROMPT, **GREEDY)
    return answer.token_ids, answer.logprobs


@pytest.fixture(scope="module")
def expected(v3_model: Path) -> tuple[list[int], list[float]]:
    with fleet_of(v3_model, "--expert-workers", "0") as fleet:
        return answer_of(fleet)


def test_a_cutoff_makes_more_passes_and_no_other_answer(
    v3_model: Path, tmp_path: Path, expected: tuple[list[int], list[float]]
) -> None:
    parameters = {"ep_level": 1, "enable_init_routing_cutoff": True, "topk_scaling_factor": 0.1}
    file = configuration(tmp_path, parameters, cutoffMinRows=8)
    with fleet_of(v3_model, "--config", file, "--expert-workers", "2") as fleet:
        assert answer_of(fleet) == expected
        status = fleet.wait_until(lambda status: status.cutoff_extra_passes, 10)
        # 300 tokens, 4 experts each, half of them here: about 600 rows in passes of 120, in 3 layers.
        assert status.cutoff_extra_passes >= 3 * 2 * 3
        assert status.a2a_overflow_rounds == 0


def test_small_buffers_make_more_rounds_and_no_other_answer(
    v3_model: Path, tmp_path: Path, expected: tuple[list[int], list[float]]
) -> None:
    parameters = {"ep_level": 2, "alltoall_ep_buffer_scale_factors": [[200, 0.25], [0, 8.0]]}
    file = configuration(tmp_path, parameters)
    with fleet_of(v3_model, "--config", file, "--expert-workers", "3") as fleet:
        assert answer_of(fleet) == expected
        status = fleet.wait_until(lambda status: status.a2a_overflow_rounds, 10)
        # 1200 rows over 3 workers, buffers of 1200 * 0.25 / 3 = 100 rows.
        assert status.a2a_overflow_rounds >= 3 * 3 * 3
        assert status.cutoff_extra_passes == 0


def test_expert_loads_and_coverage_are_exact_and_shown(v3_model: Path) -> None:
    with fleet_of(v3_model, "--expert-workers", "2", "--redundant-experts", "24") as fleet:
        assert fleet.status().coverage == 1.0  # every expert has a second replica
        answer_of(fleet)
        shown = subprocess.run(
            command("experts", "--admin", fleet.admin_address), capture_output=True, text=True, timeout=30
        )
        counted = subprocess.run(
            command("experts", "--admin", fleet.admin_address, "--json"),
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert shown.returncode == counted.returncode == 0, shown.stderr + counted.stderr
    layers = json.loads(counted.stdout)["layers"]
    assert [layer["layer_id"] for layer in layers] == [1, 2, 3]
    # 300 tokens of the prompt and 7 of the answer were computed, with 4 experts each.
    assert [sum(int(count) for count in layer["tokens"]) for layer in layers] == [307 * 4] * 3
    assert len(shown.stdout.splitlines()) == 3
    assert "1228 choices" in shown.stdout


def test_without_replicas_nothing_is_covered(v3_model: Path) -> None:
    with fleet_of(v3_model, "--expert-workers", "1") as fleet:
        status = fleet.wait_until(lambda status: status.workers[0].grouped_matmul, 10)
    assert status.coverage == 0.0
    has_kernel = native_bf16.why_unavailable() is None
    expected = "there is a kernel for bfloat16" if has_kernel else "no fused kernel for bfloat16"
    assert expected in status.workers[0].grouped_matmul


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_grouped_matmul_says_what_runs_and_changes_no_bit(
    v3_model: Path, tmp_path: Path, choice: str
) -> None:
    model = tmp_path / "w8a8"
    assert quantize_main([str(v3_model), str(model)]) == 0
    with fleet_of(model, "--expert-workers", "0") as fleet:
        alone = answer_of(fleet)
    file = configuration(tmp_path, {"ep_level": 2}, groupedMatmul=choice)
    with fleet_of(model, "--config", file, "--expert-workers", "2") as fleet:
        assert answer_of(fleet) == alone
        how = fleet.wait_until(lambda status: status.workers[0].grouped_matmul, 10).workers[0].grouped_matmul
    if choice == "off":
        assert how == "one product after another for each expert: groupedMatmul is off"
    else:
        assert "W8A8" in how
