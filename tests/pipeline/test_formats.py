"""Every number format that a target takes, in one network per target: its types, its codes and its kernels."""

from __future__ import annotations

from itertools import cycle

import onnx_ir as ir
import pytest
import torch

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.check.calls import check_calls
from qdexport.check.parity import layer_parity
from qdexport.core.formats import Format, format_of, support
from qdexport.core.recipe import Recipe
from qdexport.core.target import TARGETS
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx, stores_int4_weights
from qdexport.pipeline.quantize import plan_model
from qdexport.pipeline.validate import coverage_of
from qdexport.quant.attach import quantize_model
from qdexport.quant.checkpoint import load_quantized, save_quantized
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

STEPS = (981, 500, 1)
INT8 = {"bits": 8}
QUANTIZERS = {
    Format.W8A8: {"weight": {"bits": 8, "granularity": "per_channel"}, "activation": INT8},
    Format.W4A8: {"weight": {"bits": 4, "granularity": "per_channel"}, "activation": INT8},
    Format.W8A16: {"weight": {"bits": 8, "granularity": "per_channel"}},
    Format.W8A16_BLOCKED: {"weight": {"bits": 8, "granularity": "per_block", "block_size": 16}},
    Format.W4A16: {"weight": {"bits": 4, "granularity": "per_channel"}},
    Format.W4A16_BLOCKED: {"weight": {"bits": 4, "granularity": "per_block", "block_size": 16}},
    Format.FP8: {"weight": {"format": "fp8", "granularity": "per_channel"}, "activation": {"format": "fp8"}},
    Format.NVFP4: {"weight": {"format": "nvfp4"}, "activation": {"format": "nvfp4"}},
}
# one level, with attention: 16 linear layers and as many convolutions
SMALL = {"block_out_channels": (32,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}


def quantized(target, body, **changes):
    """A network whose layers take turns in all formats that the target has for their kind."""
    loaded = loaded_from_denoiser(random_unet("tiny_unet2d", seed=0, **SMALL), name="tiny")
    plain = Recipe.model_validate({"name": "all", "rules": [{"match": "*", **QUANTIZERS[Format.W8A8]}]})
    layers = [plan for plan in plan_model(loaded, plain) if plan.quantized]
    turns = {
        kind: cycle([form for form in Format if not support(target, form, kind).refused]) for kind in ("conv", "linear")
    }
    rules = [{"match": layer.name, **QUANTIZERS[next(turns[layer.kind])]} for layer in layers]
    recipe = plain.model_copy(update={"body": body, **changes})
    recipe = Recipe.model_validate({**recipe.model_dump(), "rules": rules})
    plans = plan_model(loaded, recipe)
    keys = sorted({key for plan in plans for key in activation_keys(plan)})
    rows = 1 if recipe.activation_rows == "static" else len(STEPS)
    draw = torch.Generator().manual_seed(0)
    ends = {key: 2 + torch.rand(rows, generator=draw, dtype=torch.float64) for key in keys}
    ranges = ActivationRanges(low={key: -end for key, end in ends.items()}, high=ends, timesteps=STEPS)
    return quantize_model(loaded, plans, recipe, ranges)


def compared(model, target, folder):
    lowered = lower_to_onnx(model, folder / "onnx", target)
    layers = layer_parity(model, lowered.file.path, lowered.facts.io, check_calls(model, lowered.facts.io, 3, seed=0))
    assert len(layers) == sum(plan.quantizes_weight for plan in model.plans)
    assert all(layer.code_flip_rate == layer.weight_flip_rate == 0 for layer in layers)
    # rounding alone: FP32 sums of some hundred terms, or operands rounded to FP16 (2^-11, which is 66 dB)
    assert min(layer.sqnr_db for layer in layers) > (60 if model.body == "fp16" else 110)
    return lowered


@pytest.mark.parametrize(
    ("name", "body", "rows"), [("tensorrt", "fp16", "static"), ("onnxruntime", "fp32", "per_step")]
)
def test_every_format_lowers_exactly(name, body, rows, tmp_path):
    """With a row per step FP8 takes the unit-scale form, as INT8 does: the E4M3 codes of x / s."""
    target = TARGETS[name]
    model = quantized(target, body, activation_rows=rows)
    assert model.rows == (1 if rows == "static" else len(STEPS))
    lowered = compared(model, target, tmp_path)
    coverage = coverage_of(model, lowered.file.path, None, int4=stores_int4_weights(model, target))
    assert coverage.mismatches == []
    for plan in model.plans:
        form = format_of(plan)
        if form is not None:
            cell = support(target, form, plan.kind)
            assert coverage.onnx[plan.name] == (body if cell.computed == "body" else cell.computed), plan.name
            if plan.weight_only:
                assert coverage.storage[plan.name].onnx == cell.stored, plan.name
                assert coverage.bits[plan.name][1] == (16 if body == "fp16" else 32)


@pytest.mark.rtx
def test_every_format_has_its_kernels(tmp_path):
    """On TensorRT-RTX, in FP16: file, checkpoint and plan have the types of the table, and codes are equal."""
    target = TARGETS["tensorrt-rtx"]
    model = quantized(target, "fp16")
    lowered = compared(model, target, tmp_path)
    options = BuildOptions(target=target, io=lowered.facts.io, compute_capabilities=("12.0",))
    facts, plan = build_engine(lowered.file.path, tmp_path / "engine", options)
    coverage = coverage_of(model, lowered.file.path, plan, int4=True)
    assert coverage.mismatches == []
    forms = {item: form for item in model.plans if (form := format_of(item)) is not None}
    assert set(forms.values()) == set(Format)
    cells = {item.name: support(target, form, item.kind) for item, form in forms.items()}
    for name, cell in cells.items():
        if cell.computed == "body":
            stored = coverage.storage[name]
            assert (stored.planned, stored.onnx, stored.engine) == (cell.stored,) * 3, name
        else:
            assert coverage.engine[name] == cell.computed, name
    assert facts.fp8_compute > 0
    assert facts.nvfp4_compute > 0
    file = ir.load(lowered.file.path)
    assert file.graph.opset_imports["trt"] == 1

    save_quantized(model, tmp_path / "checkpoint")
    again = load_quantized(tmp_path / "checkpoint", loaded=model.loaded)
    second = lower_to_onnx(again, tmp_path / "again", target)
    assert second.file.path.read_bytes() == lowered.file.path.read_bytes()
