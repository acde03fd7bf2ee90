"""Small denoisers of every family from module to engine: codes equal, INT8 as planned."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import pytest
import torch

import qdexport.graph.rows
from qdexport.build.audit import audit
from qdexport.build.engine import BuildOptions, build_engine
from qdexport.build.plan import engine_coverage
from qdexport.check.calls import check_calls, fit_inputs
from qdexport.check.exact import exact_call
from qdexport.check.measure import sqnr_db
from qdexport.check.parity import layer_parity
from qdexport.check.session import reference_session
from qdexport.check.verdict import layer_problems
from qdexport.core.recipe import load_recipe
from qdexport.core.spec import layer_precision
from qdexport.core.target import target_named
from qdexport.emit.coverage import onnx_coverage
from qdexport.graph.rows import keeps_rows_apart
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import quantize_model
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

FLOW = (1000.0, 857.142822265625, 400.5)  # timesteps of flow matching are fractions
WHOLE = (981, 501, 1)
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dit": ("tiny_dit", {}, {}),
    "pixart": ("tiny_pixart", {"num_layers": 1, "use_additional_conditions": True}, {}),
    "pixart-steps": ("tiny_pixart", {"num_layers": 1}, {"activation_rows": "per_step"}),
    "sd3": ("tiny_sd3", {}, {"channel_scale": {"match": "*", "kinds": ["linear"], "power_of_two": True}}),
    "flux": ("tiny_flux", {"num_single_layers": 1}, {"activation_rows": "per_step"}),
    "lcm-controlnet": ("tiny_lcm", UNET, {"shapes.controlnet": True}),
}
BUILT = ("pixart-steps", "sd3", "flux")


class Compiled:
    """One case, lowered."""

    def __init__(self, case: str, folder: Any) -> None:
        name, changes, overrides = CASES[case]
        flow = name in {"tiny_sd3", "tiny_flux"}
        sizes = {"shapes.height": 8, "shapes.width": 8, "shapes.tokens": 5}
        recipe = load_recipe("w8a8", {"body": "fp16", "shapes.batch": 2, **sizes, **overrides})
        loaded = loaded_from_denoiser(random_unet(name, **changes), name=name)
        plans = plan_model(loaded, recipe)
        steps = FLOW if flow else WHOLE
        rows = len(steps) if recipe.activation_rows == "per_step" else 1
        keys = [key for plan in plans for key in activation_keys(plan)]
        ends = {key: 3.0 + torch.rand(rows) for key in dict.fromkeys(keys)}
        ratios = {
            plan.group: 2.0 ** torch.randint(0, 3, loaded.denoiser.get_parameter(f"{plan.name}.weight").shape[1:2])
            for plan in plans
            if plan.channel_scale and plan.quantized
        }
        low = {key: -end for key, end in ends.items()}
        ranges = ActivationRanges(low=low, high=ends, timesteps=steps, channel_ratios=ratios)
        self.model = quantize_model(loaded, plans, recipe, ranges)
        self.target = target_named("tensorrt-rtx")
        self.rows_apart: list[bool] = []
        with patch.object(qdexport.graph.rows, "keeps_rows_apart", self._keeps_rows_apart):
            self.lowered = lower_to_onnx(self.model, folder / "onnx", self.target)
        self.path, self.io = self.lowered.file.path, self.lowered.facts.io
        self.planned = {part: layer_precision(plan, "fp16") for plan in self.model.plans for part in plan.parts}
        self.calls = check_calls(self.model, self.io, 3, 0)

    def _keeps_rows_apart(self, node: ir.Node) -> bool:
        self.rows_apart.append(keeps_rows_apart(node))
        return self.rows_apart[-1]


@pytest.fixture(scope="module", params=list(CASES))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    torch.manual_seed(3)
    return Compiled(request.param, tmp_path_factory.mktemp(request.param))


def test_layers_are_int8_in_the_file_with_equal_codes(compiled: Compiled) -> None:
    found = onnx_coverage(compiled.path, compiled.model.plans)
    assert audit(compiled.planned, found, None) == []
    assert sum(kind == "int8" for kind in found.values()) > 10
    layers = layer_parity(compiled.model, compiled.path, compiled.io, compiled.calls)
    assert layer_problems(layers, "fp16") == []
    assert all(layer.weight_flip_rate == 0 for layer in layers)
    # what is left of each layer is FP16 rounding of its output, 2^-11 of it: 66 dB
    assert min(layer.sqnr_db for layer in layers) > 60


def test_rows_of_the_time_table_are_computed_together(compiled: Compiled) -> None:
    """A thousand rows one by one take a minute in a network of usual size."""
    assert compiled.rows_apart
    assert all(compiled.rows_apart)


def test_whole_network_and_timesteps_without_a_row(compiled: Compiled) -> None:
    session = reference_session(compiled.path)
    names = {item.name for item in session.get_inputs()}
    call = compiled.calls[1]

    def run(**changes: torch.Tensor) -> np.ndarray:
        inputs = fit_inputs({**call.inputs, **changes}, compiled.io)
        output: np.ndarray = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})[0]
        return output.astype(np.float32)

    expected = exact_call(compiled.model.denoiser, fit_inputs(call.inputs, compiled.io)).numpy()
    # FP16 flips codes at ties; a wrong wire makes the outputs independent: -3 dB
    assert sqnr_db(expected, run()) > 8
    if any(plan.folded for plan in compiled.model.plans):
        fractional = call.inputs["timestep"].is_floating_point()
        for missing in (call.inputs["timestep"] + 10,) if fractional else (torch.tensor([1000]), torch.tensor([-1])):
            assert np.isnan(run(timestep=missing)).all()
    if "class_labels" in names:
        labels = call.inputs["class_labels"]
        for missing in (-1, 5000):
            answer = run(class_labels=torch.where(torch.arange(len(labels)) == 0, missing, labels))
            assert np.isnan(answer[0]).all()
            assert np.isfinite(answer[1:]).all()
    if "img_ids" in names:
        assert np.isnan(run(img_ids=call.inputs["img_ids"] - 200)).all()
    if call.inputs["timestep"].is_floating_point():
        rounded = call.inputs["timestep"].half().float()
        assert rounded != call.inputs["timestep"]
        np.testing.assert_array_equal(run(timestep=rounded), run())


@pytest.mark.rtx
@pytest.mark.parametrize("compiled", BUILT, indirect=True)
def test_layers_are_int8_in_the_plan(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = BuildOptions(target=compiled.target, io=compiled.io, compute_capabilities=("8.9",))
    facts, plan = build_engine(compiled.path, tmp_path_factory.mktemp("engine"), options)
    engine = engine_coverage(plan, list(compiled.planned))
    for part, kind in compiled.planned.items():
        if kind == "folded":
            assert engine[part] == "missing"
            engine[part] = "folded"
    assert audit(compiled.planned, onnx_coverage(compiled.path, compiled.model.plans), engine) == []
    assert facts.fp_compute == 0
