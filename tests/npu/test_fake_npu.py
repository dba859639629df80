"""The fake NPU itself: what it computes is right, and what an NPU would not do it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu

from tests.npu.emulation import EMULATED
from tests.npu.emulation.limits import OutsideLimits

NPU = torch.device("npu")


def test_tensors_live_on_the_device_and_operators_compute() -> None:
    x = torch.randn(6, 40)
    on_npu = x.to(NPU)
    assert on_npu.device.type == "npu"
    assert torch.equal((on_npu @ on_npu.t()).relu().cpu(), (x @ x.t()).relu())
    on_npu[1:3] += 1
    assert torch.equal(on_npu.cpu()[1:3], x[1:3] + 1)
    assert torch.equal(on_npu.t().reshape(-1).cpu(), on_npu.cpu().t().reshape(-1))
    chosen = on_npu[torch.tensor([4, 0], device=NPU)]
    assert torch.equal(chosen.cpu(), on_npu.cpu()[[4, 0]])
    assert float(on_npu.sum()) == pytest.approx(float(on_npu.cpu().sum()))


def test_inference_mode_changes_nothing() -> None:
    with torch.inference_mode():
        x = torch.arange(12, device=NPU).view(3, 4)
        assert x.t().reshape(-1).tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
        assert x.to(torch.float32).view(torch.uint8).view(torch.float32).tolist() == x.tolist()


def test_tensors_of_the_cpu_are_refused_beside_those_of_the_npu() -> None:
    x = torch.ones(3, device=NPU)
    with pytest.raises(RuntimeError, match="of the NPU and of the CPU"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="of the NPU and of the CPU"):
        x[torch.tensor([0, 1])]


def test_float64_is_refused_because_torch_npu_makes_it_float32_silently() -> None:
    with pytest.raises(RuntimeError, match="float64 on an NPU"):
        torch.ones(3, device=NPU).double()
    with pytest.raises(RuntimeError, match="float64 on an NPU"):
        torch.zeros(3, dtype=torch.float64, device=NPU)


def test_operators_reach_their_call_of_cann(calls: Path) -> None:
    torch_npu.npu_rms_norm(torch.ones(2, 32, device=NPU), torch.ones(32, device=NPU))
    assert calls.read_text().splitlines() == ["aclnnRmsNormGetWorkspaceSize", "aclnnRmsNorm"]


def test_an_argument_that_the_real_schema_lacks_is_refused() -> None:
    with pytest.raises((RuntimeError, TypeError), match="nonsense"):
        torch_npu.npu_rms_norm(torch.ones(2, 32, device=NPU), torch.ones(32, device=NPU), nonsense=1)


def test_every_emulation_is_of_an_operator_that_torch_npu_has() -> None:
    for name in EMULATED:
        assert hasattr(torch.ops.npu, name.removeprefix("npu::"))


def test_what_is_outside_of_the_documented_limits_is_refused_although_torch_npu_takes_it() -> None:
    rows = torch.ones(3, 32, dtype=torch.int8, device=NPU)
    weight = torch.ones(1, 32, 64, dtype=torch.int8, device=NPU)
    ends, scales = torch.tensor([3], device=NPU), torch.ones(1, 64, device=NPU)
    with pytest.raises(OutsideLimits, match="FRACTAL_NZ"):
        torch_npu.npu_grouped_matmul_swiglu_quant(rows, weight, ends, scales, torch.ones(3, device=NPU))
    with pytest.raises(OutsideLimits, match=r"input is torch\.float32"):
        torch_npu.npu_dynamic_quant(torch.ones(3, 32, device=NPU))
    with pytest.raises(OutsideLimits, match=r"weight is \[E, K, N\]"):
        torch_npu.npu_grouped_matmul(
            [torch.ones(3, 32, device=NPU)],
            [torch.ones(1, 33, 8, device=NPU)],
            group_list=ends,
            split_item=2,
            group_type=0,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(1, 4, 1024)}, r"x is torch\.float32"),
        ({"expert_ids": torch.tensor([[[0, 1], [1, 1], [0, 1], [0, 1]]], dtype=torch.int32)}, "differ"),
        ({"active_mask": torch.tensor([[True, False, True, True]])}, "come first"),
        ({"world_size": 769}, "world_size is 769"),
        ({"ffn_token_info_table_shape": [1, 1, 8]}, "ffn_token_info_table_shape"),
        ({"expert_rank_table": torch.tensor([[[1, 0, 0]] * 3], dtype=torch.int32)}, "at rank 0"),
        ({}, "let nobody here into its window"),
    ],
)
def test_the_operator_of_the_windows_is_refused_outside_of_its_documented_limits(
    changes: dict[str, object], words: str
) -> None:
    zero = torch.zeros(1, dtype=torch.int32)
    given: dict[str, object] = {
        "x": torch.zeros(1, 4, 1024, dtype=torch.bfloat16),
        "session_id": zero,
        "micro_batch_id": zero,
        "layer_id": zero,
        "expert_ids": torch.tensor([[[0, 1]] * 4], dtype=torch.int32),
        "expert_rank_table": torch.tensor([[[1, 1, 0]] * 3], dtype=torch.int32),
        "group": "no such group",
        "world_size": 2,
        "ffn_token_info_table_shape": [1, 1, 2 + 4 * 2],
        "ffn_token_data_shape": [1, 1, 4, 2, 1024],
        "attn_token_info_table_shape": [1, 4, 2],
        "moe_expert_num": 3,
        "sync_flag": 1,
        "ffn_start_rank_id": 1,
        **changes,
    }
    on_npu = {name: one.to(NPU) if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    with pytest.raises(OutsideLimits, match=words):
        torch.ops.npu.npu_attention_to_ffn(**on_npu)


def test_a_process_that_does_not_ask_for_an_npu_does_not_load_torch_npu() -> None:
    script = "import sys, torch; print('torch_npu' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
