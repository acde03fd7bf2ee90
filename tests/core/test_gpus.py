"""The table of GPUs: rates that belong together, and refusals by name."""

from __future__ import annotations

import pytest

from qdexport.core.gpus import GPUS, gpu_named
from qdexport.errors import RecipeError


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_a_narrower_type_is_at_least_as_fast(gpu):
    assert gpu.rate("fp32") < gpu.rate("fp16") < gpu.rate("int8")
    if gpu.fp8 is not None:
        assert gpu.rate("fp16") < gpu.rate("fp8") <= gpu.rate("int8")
    if gpu.nvfp4 is not None:
        assert gpu.rate("nvfp4") >= 2 * gpu.rate("fp8")
    assert gpu.rate("int4") == gpu.rate("int8"), "4-bit weights are widened before the product"


@pytest.mark.parametrize("name", ["rtx-3090", "a100", "orin"])
def test_fp8_begins_with_compute_capability_8_9(name):
    with pytest.raises(RecipeError, match=r"has no matrix products in fp8"):
        gpu_named(name).rate("fp8")


def test_an_unknown_gpu_is_refused_with_the_table():
    with pytest.raises(RecipeError, match=r"unknown GPU 'gtx-480'; the table has rtx-3090, rtx-4090"):
        gpu_named("gtx-480")
    assert gpu_named("RTX-4090") is GPUS["rtx-4090"]
