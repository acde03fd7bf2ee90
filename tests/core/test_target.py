"""The capability table."""

from __future__ import annotations

import pytest

from qdexport.core.target import TARGETS, target_named
from qdexport.errors import RecipeError


def test_every_target_is_consistent() -> None:
    for name, target in TARGETS.items():
        assert target.name == name == target_named(name).name
        assert set(target.default_compute_capabilities) <= set(target.compute_capabilities)
        low, high = target.opsets
        assert 20 <= low <= target.opset <= high <= 23
        assert set(target.bodies) <= {"fp32", "fp16", "bf16"}
        assert not (target.needs_gpu_to_build and target.compute_capabilities)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown target 'trt'; known targets: tensorrt-rtx, tensorrt, tensorrt-10, onnxruntime"
    ):
        target_named("trt")


def test_another_opset() -> None:
    rtx = target_named("tensorrt-rtx")
    assert rtx.with_opset(None) is rtx
    assert rtx.with_opset(23).opset == 23
    assert rtx.int4_linear
    assert not rtx.with_opset(20).int4_linear  # INT4 tensors came with opset 21
    with pytest.raises(RecipeError, match="target tensorrt-10 takes opset 20 to 20, not 21; remove `opset`"):
        target_named("tensorrt-10").with_opset(21)
