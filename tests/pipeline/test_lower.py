"""Captured networks with constant first tokens, split shortcuts and INT4 weights, against their fake-quant models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdexport.check.calls import check_calls
from qdexport.check.parity import layer_parity
from qdexport.check.session import reference_session
from qdexport.core.recipe import load_recipe
from qdexport.core.spec import layer_precision
from qdexport.core.target import TARGETS
from qdexport.emit.coverage import onnx_coverage
from qdexport.errors import RecipeError
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx, network_facts
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import quantize_model
from qdexport.quant.bos import Bos
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

STEPS = (981, 500, 1)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def compiled(request, tmp_path_factory):
    """``tiny_sd`` with random weights and ranges; 8 layers read the text behind its first token."""
    loaded = loaded_from_denoiser(random_unet("tiny_sd", seed=0), name="tiny")
    changes = {"bos": "constant", "split_shortcuts": True, "body": request.param}
    recipe = load_recipe("w4a8", changes)
    plans = plan_model(loaded, recipe)
    draw = torch.Generator().manual_seed(0)
    keys = sorted({key for plan in plans if plan.quantized for key in activation_keys(plan)})
    ends = {key: torch.rand(2, 1, generator=draw, dtype=torch.float64) * 3 + 1 for key in keys}
    embedding = torch.randn(loaded.denoiser.config.cross_attention_dim, generator=draw)
    embedding[1] = 100
    ranges = ActivationRanges(
        low={key: -end[0] for key, end in ends.items()},
        high={key: end[1] for key, end in ends.items()},
        timesteps=STEPS,
        bos=Bos(embedding=embedding),
    )
    model = quantize_model(loaded, plans, recipe, ranges)
    lowered = lower_to_onnx(model, tmp_path_factory.mktemp("lowered") / "onnx", TARGETS["tensorrt-rtx"])
    return SimpleNamespace(model=model, lowered=lowered, path=lowered.file.path, io=lowered.facts.io)


def test_every_layer_is_what_was_planned(compiled):
    plans = compiled.model.plans
    planned = {
        part: layer_precision(plan, compiled.model.body, int4_linear=True) for plan in plans for part in plan.parts
    }
    assert onnx_coverage(compiled.path, plans) == planned
    assert {"int4", "int8", "folded"} == set(planned.values())
    skipped = {report.name: report.skipped for report in compiled.lowered.passes}
    assert not skipped["split-shortcut"]
    assert not skipped["fold-adapters"]


def test_first_tokens_and_shortcuts_are_gone(compiled):
    graph = ir.load(compiled.path).graph
    first = [node.name for node in graph if ".first_token/" in node.name]
    layers = [f"{plan.name}.first_token/Concat" for plan in compiled.model.plans if plan.bos]
    assert len(layers) == 8
    # one Slice takes the first token for all of them
    assert sorted(name for name in first if not name.endswith("/Slice")) == sorted(layers)
    assert len(first) == len(layers) + 1
    for plan in compiled.model.plans:
        cuts = [node.name for node in graph if node.name.startswith(f"{plan.name}/S")]
        assert not plan.splits or not cuts


def test_layers_have_the_codes_of_pytorch(compiled):
    calls = check_calls(compiled.model, compiled.io, 3, seed=0)
    layers = layer_parity(compiled.model, compiled.path, compiled.io, calls)
    assert all(layer.code_flip_rate == layer.weight_flip_rate == 0 for layer in layers)
    # rounding alone: FP32 sums, or operands rounded to FP16 (2^-11, which is 66 dB), of some hundred terms
    assert min(layer.sqnr_db for layer in layers) > (60 if compiled.model.body == "fp16" else 110)


def test_a_zeroed_prompt_and_an_unknown_one(compiled):
    """Zeroed text and the stored token are answered in one batch; another first token is NaN, for its row alone."""
    (call,) = check_calls(compiled.model, compiled.io, 1, seed=0)
    feeds = {name: tensor.numpy() for name, tensor in call.inputs.items()}
    session = reference_session(compiled.path)
    text = feeds["encoder_hidden_states"]
    text[0] = 0
    (known,) = session.run(None, feeds)
    assert np.isfinite(known).all()
    text[1, 0] += 3
    (unknown,) = session.run(None, feeds)
    np.testing.assert_array_equal(unknown[0], known[0])
    assert np.isnan(unknown[1]).all()


def test_fractional_timesteps_have_no_table_of_all(with_equal_ranges):
    model = with_equal_ranges({"time_embedding": "all"}, (1000.0, 400.5), "tiny_sd3")
    with pytest.raises(RecipeError, match="`time_embedding: all` has a row for every whole timestep"):
        network_facts(model, TARGETS["tensorrt-rtx"])


def test_time_layers_that_are_kept_may_be_quantized_by_step(with_equal_ranges, tmp_path):
    """A quantizer with a row per step in the time layers is no broadcast, and no table is asked for."""
    model = with_equal_ranges({"time_embedding": "keep", "activation_rows": "per_step"}, (981, 500, 1))
    assert model.rows == len(STEPS)
    assert lower_to_onnx(model, tmp_path / "onnx", TARGETS["tensorrt-rtx"]).facts.time_table is None
