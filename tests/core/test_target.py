"""The capability table."""

from __future__ import annotations

import pytest

from qdexport.core.target import TARGETS, target_named
from qdexport.errors import RecipeError


def test_every_target_is_consistent() -> None:
    for name, target in TARGETS.items():
        assert target.name == name == target_named(name).name
        assert set(target.default_compute_capabilities) <= set(target.compute_capabilities)
        assert target.opset >= 21
        assert set(target.bodies) <= {"fp32", "fp16", "bf16"}
        assert not (target.needs_gpu_to_build and target.compute_capabilities)


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown target 'trt'; known targets: tensorrt-rtx, tensorrt, onnxruntime"
    ):
        target_named("trt")
