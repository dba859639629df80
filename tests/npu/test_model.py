"""The whole model on an NPU, in one process, against the reference kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.npu.model_within_limits import write_within_limits
from tests.npu.test_kernels import called
from tests.router.driver import Driver, random_prompts

FUSED = {
    "aclnnRmsNorm",
    "aclnnRotaryPositionEmbeddingV2",
    "aclnnMoeGatingTopK",
    "aclnnFusedInferAttentionScoreV3",
    "aclnnGroupedMatmulV5",
}
FUSED_INT8 = {"aclnnGroupedMatmulSwigluQuantWeightNZ", "aclnnDynamicQuantV2", "aclnnQuantMatmulV5"}


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize(
    ("dtype", "is_w8a8", "error"),
    [("float32", False, 1e-4), ("bfloat16", False, 0.06), ("bfloat16", True, 0.08)],
)
def test_logits_are_those_of_the_reference_within_the_rounding_of_the_dtype(
    family: str, dtype: str, is_w8a8: bool, error: float, tmp_path: Path, calls: Path
) -> None:
    model = write_within_limits(tmp_path, family, is_w8a8, vocab_size=256)
    prompts = random_prompts((21, 5), 256)
    found = []
    for device in ("reference", "npu"):
        driver = Driver(model, dtype, device=device)
        sequences = [driver.sequence([*prompt, 7, 9], num_prompt_tokens=len(prompt)) for prompt in prompts]
        found.append(driver.finish(*sequences, chunk_size=8).cpu())
    reference, on_npu = found
    assert on_npu.dtype == torch.float32
    assert float((on_npu - reference).abs().max()) <= error * float(reference.std())
    if dtype == "bfloat16":
        wanted = FUSED | FUSED_INT8 if is_w8a8 else FUSED
        assert wanted <= set(called(calls))
