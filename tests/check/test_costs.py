"""Bytes and least times of the layers, in FP16 and as planned."""

from __future__ import annotations

import dataclasses

import pytest

from qdexport.check.costs import cost_of
from qdexport.core.gpus import GPUS
from qdexport.core.results import Plan
from qdexport.pipeline.quantize import plan_model
from qdexport.pipeline.validate import coverage_of
from qdexport.quant.layer_groups import layer_shapes
from tests.check.conftest import Compiled


@pytest.fixture
def sized(static: Compiled) -> Compiled:
    """The plans know how much each layer computes."""
    plans = tuple(plan_model(static.model.loaded, static.model.recipe))
    return dataclasses.replace(static, model=dataclasses.replace(static.model, plans=plans))


def test_int8_moves_less_than_fp16(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    cost = cost_of(sized.model, coverage, None)
    assert cost is not None
    shapes = layer_shapes(sized.model.loaded.denoiser, sized.model.plans)
    weights = sum(shape.weights for shape in shapes.values())
    scales = 4 * sum(shape.channels for shape in shapes.values())
    assert cost.gpu == "RTX 4090"
    assert cost.fp16.weight_bytes == 2 * weights
    assert cost.quantized.weight_bytes == weights + scales  # every layer that runs is INT8
    moved = sum(shape.inputs + 4 * shape.outputs for shape in shapes.values())
    assert cost.quantized.moved_bytes == moved + weights + scales  # an FP32 body
    assert cost.plan is None


def test_times_are_those_of_the_roofline(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    cost = cost_of(sized.model, coverage, None, ("9.0",))
    assert cost is not None
    gpu = GPUS["h100"]
    assert cost.gpu == gpu.name
    shapes = layer_shapes(sized.model.loaded.denoiser, sized.model.plans).values()
    seconds = sum(
        max(2 * shape.macs / gpu.fp16, 2 * (shape.inputs + shape.weights + shape.outputs) / gpu.bandwidth)
        for shape in shapes
    )
    assert cost.fp16.microseconds == pytest.approx(1e6 * seconds, abs=0.006)


def test_a_card_is_taken_that_has_the_type(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    coverage.planned = {name: "fp8" if kind == "int8" else kind for name, kind in coverage.planned.items()}
    cost = cost_of(sized.model, coverage, None, ("8.6", "8.9"))
    assert cost is not None
    assert cost.gpu == "RTX 4090"


def test_weights_stored_alone_are_read_as_they_are_stored(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    coverage.planned = {name: "int4" if kind == "int8" else kind for name, kind in coverage.planned.items()}
    narrow = cost_of(sized.model, coverage, None)
    assert narrow is not None
    assert narrow.quantized.weight_bytes < narrow.fp16.weight_bytes / 3


def test_a_plan_stands_beside_the_layers(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    cost = cost_of(sized.model, coverage, Plan(target="tensorrt-rtx", kernels=[]))
    assert cost is not None
    assert cost.plan is not None
    assert cost.plan.moved_bytes == 0


def test_sizes_that_are_not_known_have_no_cost(sized: Compiled) -> None:
    coverage = coverage_of(sized.model, sized.path, None, int4=False)
    plans = tuple(dataclasses.replace(plan, macs=0) for plan in sized.model.plans)
    assert cost_of(dataclasses.replace(sized.model, plans=plans), coverage, None) is None
