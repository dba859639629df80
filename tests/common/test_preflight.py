"""What is checked before weights load: the numbers needed, against examples worked out elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import Config, load_config
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.preflight import Finding, require, size
from common.preflight_fleet import fixed_findings
from common.preflight_group import group_findings
from common.preflight_memory import MemoryNeed, buffer_bytes, memory_finding
from common.preflight_npu import (
    ExpertGroup,
    Generation,
    dispatch_findings,
    kernel_findings,
    least_buffer_mb,
)
from common.rank_table import parse_rank_table
from tests.common.test_rank_table import table
from tests.router.front_fleet import MODEL

R1 = ExpertGroup(256, 8, 7168, 2048, 8, ep_size=16, most_tokens=256)


def config_of(overrides: dict[str, Any]) -> Config:
    return load_config(None, overrides)


def model_of(**overrides: Any) -> ModelConfig:
    facts = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "family": "v3"}
    known = {name: value for name, value in MODEL.items() if name in ModelConfig.model_fields}
    return ModelConfig.model_validate({**facts, **known, **overrides})


def test_a_finding_that_is_not_met_names_the_value_the_rule_and_the_way_out() -> None:
    unmet = Finding("HCCL_BUFFSIZE", "at least 900 MB", "200 MB", False, "set HCCL_BUFFSIZE=900")
    assert unmet.sentence == "HCCL_BUFFSIZE is 200 MB, but at least 900 MB is needed: set HCCL_BUFFSIZE=900"
    met = Finding("HCCL_BUFFSIZE", "at least 900 MB", "1024 MB", True, "")
    require([met])
    with pytest.raises(ConfigError) as caught:
        require([unmet, met, unmet])
    assert caught.value.problems == (unmet.sentence, unmet.sentence)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (1023, "1023 bytes")]
)
def test_sizes_are_written_for_people(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"ModelConfig.worldSize": 4}, ""),
        (
            {"ModelConfig.worldSize": 3},
            "ModelConfig[0].moe_ep is 3, but a divisor of the checkpoint's n_routed_experts (8) is needed: "
            "choose another worldSize or moe_ep",
        ),
        ({"ModelConfig.worldSize": 3, "ExpertMesh.redundantExperts": 1}, ""),
        (
            {"ModelConfig.worldSize": 3, "ExpertMesh.redundantExperts": 2},
            "ExpertMesh.redundantExperts is 2, but a number that makes n_routed_experts (8) + it divisible "
            "by moe_ep (3) is needed: set it to 4, or choose another worldSize",
        ),
        ({"ModelConfig.worldSize": 0}, ""),
    ],
)
def test_experts_must_be_dealt_out_evenly(overrides: dict[str, Any], sentence: str) -> None:
    unmet = [one.sentence for one in group_findings(config_of(overrides), model_of()) if not one.is_met]
    assert unmet == ([sentence] if sentence else [])


@pytest.mark.parametrize(
    ("generation", "tokens", "megabytes"),
    # The examples that the vendor's documents work out for DeepSeek-R1 on 16 NPUs.
    [("A2", 256, 900), ("A3", 64, 478)],
)
def test_the_buffer_of_dispatch_is_what_the_documents_work_out(
    generation: Generation, tokens: int, megabytes: int
) -> None:
    group = ExpertGroup(256, 8, 7168, 2048, 8, ep_size=16, most_tokens=tokens)
    assert least_buffer_mb(group, generation) == megabytes
    for buffer_mb, is_met in ((megabytes - 1, False), (megabytes, True), (None, False)):
        finding = list(dispatch_findings(group, generation, buffer_mb))[-1]
        assert finding.what == "HCCL_BUFFSIZE"
        assert finding.is_met is is_met
        assert f"at least {megabytes} MB" in finding.needed
    assert "200 MB (not set)" in finding.sentence
    assert f"HCCL_BUFFSIZE={megabytes}" in finding.sentence


def unmet_of(generation: Generation, **changes: int) -> list[str]:
    facts = {
        **dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "hidden_size"), 0),
        **{name: getattr(R1, name) for name in R1.__slots__},
        **changes,
    }
    group = ExpertGroup(**facts)
    findings = [*dispatch_findings(group, generation, 1 << 20), *kernel_findings(group)]
    return [finding.what for finding in findings if not finding.is_met]


@pytest.mark.parametrize(
    ("generation", "changes", "what"),
    [
        ("A2", {}, []),
        ("A3", {}, []),
        ("A2", {"ep_size": 12}, ["moe_ep"]),
        ("A3", {"ep_size": 12}, ["moe_ep"]),
        ("A3", {"ep_size": 64}, []),
        ("A2", {"ep_size": 1}, ["moe_ep"]),
        ("A2", {"most_tokens": 257}, ["the number of tokens"]),
        ("A3", {"most_tokens": 512}, []),
        ("A3", {"most_tokens": 513}, ["the number of tokens"]),
        ("A2", {"hidden_size": 7200}, ["hidden_size of npu_moe_distribute_dispatch"]),
        ("A3", {"hidden_size": 7200}, []),
        ("A2", {"hidden_size": 7150}, ["hidden_size of npu_moe_distribute_dispatch"]),
        ("A3", {"hidden_size": 992}, ["hidden_size of npu_moe_distribute_dispatch"]),
        ("A2", {"num_experts_per_tok": 17}, ["num_experts_per_tok"]),
        ("A2", {"moe_intermediate_size": 5121}, ["2 * moe_intermediate_size"]),
        ("A2", {"num_groups": 128}, ["the number of experts per group"]),
        (
            "A2",
            {"n_routed_experts": 2064},
            ["n_routed_experts"] * 2,
        ),
        ("A3", {"n_routed_experts": 2064}, ["n_routed_experts", "experts per worker", "n_routed_experts"]),
        ("A2", {"n_routed_experts": 1024 * 17}, ["n_routed", "n_routed", "the number of experts per worker"]),
    ],
)
def test_limits_of_the_fused_operators_are_named(
    generation: Generation, changes: dict[str, int], what: list[str]
) -> None:
    found = unmet_of(generation, **changes)
    assert len(found) == len(what), found
    assert all(one.startswith(begin) for one, begin in zip(found, what, strict=True)), found


def test_memory_is_compared_with_what_is_free_and_both_numbers_are_said() -> None:
    need = MemoryNeed(weights=12 << 30, buffers=512 << 20)
    finding = memory_finding("expert worker a", "cpu", need, 8 << 30, "use more workers")
    assert finding.sentence == (
        "the free memory of this machine for expert worker a is 8.0 GiB, but 12.5 GiB (12.0 GiB of weights, "
        "512 MiB of buffers) is needed: use more workers"
    )
    assert memory_finding("the router", "cuda:0", need, need.total, "").is_met
    assert not memory_finding("the router", "cuda:0", need, need.total - 1, "").is_met


def test_buffers_hold_the_rows_that_the_parameters_bound() -> None:
    model = model_of(num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=16)
    level_1 = config_of({"ScheduleConfig.maxPrefillTokens": 900, "ScheduleConfig.maxBatchSize": 100})
    level_2 = level_1.model_copy(update={"ep_level": 2})

    def of(config: Config, buffer_mb: int | None = None, **changes: Any) -> int:
        return buffer_bytes(config.model_copy(update=changes), model, buffer_mb)

    # 1000 tokens, 2 experts each, factor 8 of 2 workers: all 2000 rows, of (2 * 16 + 3 * 16) float32.
    assert of(level_2) == 2000 * 80 * 4
    assert of(level_2, micro_batches=2) == 1000 * 80 * 4
    assert of(level_2, alltoall_ep_buffer_scale_factors=((0, 0.5),)) == 500 * 80 * 4
    assert of(level_2, device="npu") == 2000 * 80 * 4 + 400 * 2**20
    assert of(level_2, 900, device="npu") == 2000 * 80 * 4 + 1800 * 2**20
    # A worker with one expert of each layer gets a token once.
    assert of(level_2, moe_ep=8, world_size=8) == 1000 * 80 * 4
    # At level 1 all tokens come too, as 16 float32 with 2 choices, and go as 16 float64.
    cutoff: dict[str, Any] = {
        "enable_init_routing_cutoff": True,
        "topk_scaling_factor": 0.25,
        "cutoff_min_rows": 1,
    }
    assert of(level_1, **cutoff) == 500 * 80 * 4 + 1000 * (16 * 12 + 24)
    assert of(level_1) == 2000 * 80 * 4 + 1000 * (16 * 12 + 24)


@pytest.mark.parametrize(("is_super_node", "least"), [(False, 900), (True, 1912)])
def test_a_fleet_on_npus_is_held_against_the_operators_and_the_buffer(
    is_super_node: bool, least: int
) -> None:
    model = model_of(
        n_routed_experts=256,
        num_experts_per_tok=8,
        hidden_size=7168,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
    )
    document = table(2, 8)
    if is_super_node:
        document["server_list"][0]["device"][0]["super_device_id"] = "0"
    ranks = parse_rank_table(document)
    changes = {"world_size": 16, "moe_ep": 16, "ep_level": 2, "max_batch_size": 256}
    config = config_of({}).model_copy(update=changes)

    def unmet(buffer_mb: int | None, **more: Any) -> list[str]:
        findings = fixed_findings(config.model_copy(update=more), model, ranks, buffer_mb)
        return [finding.sentence for finding in findings if not finding.is_met]

    assert unmet(None) == []
    assert unmet(least, device="npu") == []
    (sentence,) = unmet(None, device="npu")
    assert sentence.startswith(f"HCCL_BUFFSIZE is 200 MB (not set), but at least {least} MB (256 tokens, ")
    assert unmet(None, device="npu", ep_level=1) == []
    # Half as many tokens at a time need half the buffer, but for A2's 2 MB.
    assert unmet(least // 2 + 2, device="npu", micro_batches=2) == []
    on_npus = {"device": "npu", "dtype": "bfloat16"}
    (carrier,) = [
        finding.sentence
        for finding in fixed_findings(config.model_copy(update=on_npus), model, ranks, least)
        if finding.what.startswith("what carries rows")
    ]
    fused = "A3 is npu_attention_to_ffn and npu_ffn_to_attention for up to 512 tokens at a time, and Hccl"
    assert (fused in carrier) == is_super_node
    assert ("A2 is HcclAlltoAllV; npu_attention_to_ffn cannot be used, because" in carrier) != is_super_node
    assert "npu_moe_distribute_dispatch_v2 cannot be used, because" in carrier
    (sentence,) = unmet(least, device="npu", world_size=8)
    assert sentence.startswith(
        "ModelConfig[0].worldSize is 8, but the number of ranks in the rank table (16)"
    )
