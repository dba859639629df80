"""Router and expert workers with `--device npu`, as a user starts them, over HCCL's process groups."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import admin_pb2, admin_pb2_grpc
from tests.e2e.fleet import Answer, Fleet, fleet_of, generate
from tests.npu.model_within_limits import write_within_limits

PROMPT = [100 + 7919 * i % 100000 for i in range(24)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, "logprobs": 2}
WIDE: dict[str, Any] = {"hidden_size": 1024, "vocab_size": 2048}
"""Wide enough for rows to travel through windows; a small vocabulary, since most of a wide model is that."""
SMALL_PROMPT = [100 + 79 * i % 1900 for i in range(24)]
FUSED = "npu_attention_to_ffn and npu_ffn_to_attention for up to 512 tokens"
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
ROUNDING = 0.15
"""Of a logprob: logits around 8 are rounded to 1/32 in bfloat16, and so is what they are made of."""
CONFIGURATION = {
    "ModelDeployConfig": {"maxSeqLen": 1024},
    "ScheduleConfig": {"maxBatchSize": 2},  # a small cache: its zeros are written, unlike a CPU's
    "ExpertMesh": {"deadlineFloorSeconds": 5.0},  # operators are emulated in Python, beside other work
}


@contextmanager
def npu_fleet(model: Path, folder: Path) -> Iterator[Fleet]:
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGURATION))
    with fleet_of(model, "--device", "npu", "--config", str(file), "--expert-workers", "2") as fleet:
        yield fleet


def switch_to_level_2(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.admin_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        document: dict[str, Any] = json.loads(
            stub.GetConfig(admin_pb2.GetConfigRequest(), timeout=10).config_json
        )
        (model,) = document["ModelDeployConfig"].setdefault("ModelConfig", [{}])
        model.setdefault("models", {}).setdefault("deepseekv2", {})["ep_level"] = 2
        request = admin_pb2.ReloadConfigRequest(config_json=json.dumps(document))
        assert stub.ReloadConfig(request, timeout=30).applied


def assert_equal_within_rounding(answer: Answer, reference: Answer) -> None:
    """The same tokens, up to one that the reference itself nearly did not choose; and their logprobs."""
    compared = 0
    for index, (token_id, expected) in enumerate(zip(answer.token_ids, reference.token_ids, strict=True)):
        (_, best), (_, second) = reference.top[index]
        if token_id != expected:
            assert best - second < ROUNDING, f"token {index} differs and was chosen clearly"
            break
        assert abs(answer.logprobs[index] - reference.logprobs[index]) < ROUNDING
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize(("family", "is_w8a8"), [("v2", False), ("v3", True)])
def test_both_levels_answer_as_the_reference_does_and_with_the_same_bits(
    family: str, is_w8a8: bool, tmp_path: Path
) -> None:
    model = write_within_limits(tmp_path, family, is_w8a8)
    with fleet_of(model, "--expert-workers", "0") as on_cpu:
        reference = generate(on_cpu, PROMPT, **GREEDY)
    with npu_fleet(model, tmp_path) as fleet:
        assert [worker.device for worker in fleet.status().workers] == ["npu", "npu"]
        own_device = [one.environ()[VISIBLE] for one in (fleet.engine(), *fleet.executors())]
        assert sorted(own_device) == ["0", "1", "2"]
        at_level_1 = generate(fleet, PROMPT, **GREEDY)
        switch_to_level_2(fleet)
        at_level_2 = generate(fleet, PROMPT, **GREEDY)
        assert fleet.status().ep_level == 2
    assert (at_level_1.token_ids, at_level_1.logprobs) == (at_level_2.token_ids, at_level_2.logprobs)
    assert_equal_within_rounding(at_level_1, reference)


@pytest.mark.parametrize(("family", "is_w8a8"), [("v2", False), ("v3", True)])
def test_on_a3_rows_travel_through_windows_and_on_a2_they_do_not_with_the_same_bits(
    family: str, is_w8a8: bool, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_within_limits(tmp_path, family, is_w8a8, **WIDE)
    with fleet_of(model, "--expert-workers", "0") as on_cpu:
        reference = generate(on_cpu, SMALL_PROMPT, **GREEDY)
    answers = []
    for device, carrier in (("Ascend910_9391", FUSED), ("Ascend910B3", "HcclAlltoAllV; ")):
        monkeypatch.setenv("FAKE_CANN_SOC", device)
        with npu_fleet(model, tmp_path) as fleet:
            switch_to_level_2(fleet)
            calls.write_text("")
            answers.append(generate(fleet, SMALL_PROMPT, **GREEDY))
            for worker in fleet.status().workers:
                assert worker.transport.startswith(f"collective: at ep_level 2 by {carrier}")
        seen = set(calls.read_text().splitlines())
        assert ("aclnnAttentionToFFN" in seen, "HcclAlltoAllV" in seen) == (
            carrier == FUSED,
            carrier != FUSED,
        )
    (on_a3, on_a2) = answers
    assert (on_a3.token_ids, on_a3.logprobs) == (on_a2.token_ids, on_a2.logprobs)
    assert_equal_within_rounding(on_a3, reference)


@pytest.mark.parametrize(
    ("how", "ep_level", "is_wide"),
    [
        (signal.SIGKILL, 1, False),
        (signal.SIGSTOP, 2, False),
        (signal.SIGKILL, 2, True),
        (signal.SIGSTOP, 2, True),
    ],
)
def test_a_worker_that_dies_or_stalls_is_missed_in_time_and_the_answer_goes_on(
    how: signal.Signals, ep_level: int, is_wide: bool, tmp_path: Path
) -> None:
    model = write_within_limits(tmp_path, "v2", **(WIDE if is_wide else {}))
    prompt = SMALL_PROMPT if is_wide else PROMPT
    with npu_fleet(model, tmp_path) as fleet:
        if ep_level == 2:
            switch_to_level_2(fleet)
        assert all((FUSED in worker.transport) == is_wide for worker in fleet.status().workers)
        long = {**GREEDY, "max_tokens": 48}
        before = generate(fleet, prompt, **long)
        epoch, num_steps = fleet.status().epoch, fleet.status().num_steps
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(generate, fleet, prompt, timeout=120, **long)
            fleet.wait_until(
                lambda status: status.num_requests_running == 1 and status.num_steps > num_steps + 8
            )
            fleet.executors()[1].send_signal(how)
            signalled = time.monotonic()
            fleet.wait_until(lambda status: not status.ready, 30)
            assert time.monotonic() - signalled < 30
            assert stream.result(timeout=120) == before
        status = fleet.wait_until(lambda status: status.ready and status.epoch > epoch, 90)
        assert status.recoveries == 1
