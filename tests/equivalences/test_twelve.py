"""Twelve equivalences of the quantization methods, each small and literal, and independent of the other tests.

Every one of them catches a mistake that the published code of some method makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdexport.core.bit_plan import BitPlan, LayerBits
from qdexport.core.progress import SilentProgress
from qdexport.core.recipe import Recipe
from qdexport.core.spec import ObserverSpec, QuantSpec
from qdexport.core.target import TARGETS
from qdexport.errors import ModelError, RecipeError
from qdexport.graph.evaluate import evaluate
from qdexport.graph.runner import PassContext, run_passes
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.sampling import SampleRequest, sample
from qdexport.models.synthetic import random_unet
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline
from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.fold_time_embedding import FoldTimeEmbedding
from qdexport.passes.lower_zero_point import LowerZeroPoint
from qdexport.passes.precompute_bos import PrecomputeBos
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized, plan_model
from qdexport.quant import allocation
from qdexport.quant.affine import fake_quantize_reference, parameters_from_range, quantize_codes
from qdexport.quant.attach import quantize_model, weight_scale
from qdexport.quant.checkpoint import QUANTIZATION_FILE, save_quantized
from qdexport.quant.integer_program import split_budget
from qdexport.quant.layer_groups import group_of, layer_shapes
from qdexport.quant.modules import (
    ActivationQuantizer,
    ChannelScale,
    FirstToken,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    StepContext,
    StepRows,
    WeightQuantizer,
    install_step_rows,
)
from qdexport.quant.observers import make_observer
from qdexport.quant.ops import NO_AXIS, fake_quantize
from qdexport.quant.packing import pack_codes, unpack_codes
from qdexport.quant.plan import activation_keys, plan_layers
from qdexport.quant.ranges import ActivationRanges, given_ranges
from qdexport.quant.result_cache import SweepRun
from qdexport.quant.sensitivity_table import LayerSensitivity, SensitivityTable

MakeGraph = Callable[[str, str, str, Mapping[str, np.ndarray]], ir.Model]
MakeContext = Callable[..., PassContext]

RULE = {
    "match": "*",
    "weight": {"bits": 8, "granularity": "per_channel"},
    "activation": {"bits": 8, "symmetric": False, "signed": False},
}
CALIBRATION = {"prompts": 1, "batch_size": 1, "steps": 2, "guidance_scale": 3.0, "seed": 7}


def _recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "rules": [RULE], "calibration": CALIBRATION, **changes})


# 1


@torch.no_grad()
def test_01_folding_splitting_and_first_tokens_change_nothing_in_floating_point(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(
        split_shortcuts=True,
        bos="constant",
        channel_scale={"kinds": ["conv", "linear"], "choose_ratio": False, "groups": 1},
    )
    model = make_quantized(tiny, recipe, QuantizeSettings(target=TARGETS["tensorrt-rtx"]), SilentProgress())
    found = {type(module) for module in model.denoiser.modules()}
    assert {QuantSplitConv2d, FirstToken, ChannelScale, QuantConv2d, QuantLinear} <= found
    inputs = example_inputs(io_spec(tiny, recipe.shapes, "fp32"), seed=0)
    quantized = call_denoiser(model.denoiser, inputs)
    monkeypatch.setattr(ActivationQuantizer, "forward", lambda _self, x: x)
    monkeypatch.setattr(WeightQuantizer, "forward", lambda _self, w, dtype=None: w if dtype is None else w.to(dtype))
    before, after = call_denoiser(tiny.denoiser, inputs), call_denoiser(model.denoiser, inputs)
    # FP32 sums in another order, some twenty layers deep: 1e-5 of the largest value, as methods.md asks
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert float((quantized - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_01_time_lookup_changes_nothing(
    make_graph: MakeGraph, make_context: MakeContext, noise: np.random.Generator
) -> None:
    body = """
    ["time_proj/Unsqueeze"] t2 = Unsqueeze(timestep, axis)
    ["time_proj/Cast"] tf = Cast<to: int = 1>(t2)
    ["time_proj/Mul"] angles = Mul(tf, freqs)
    ["time_proj/Sin"] sines = Sin(angles)
    ["time_embedding.linear_1/MatMul"] p1 = MatMul(sines, w1)
    ["time_embedding.linear_1/Add"] emb = Add(p1, b1)
    ["resnets.0.time_emb_proj/MatMul"] e1 = MatMul(emb, w2)
    ["resnets.0/Unsqueeze"] e4 = Unsqueeze(e1, last)
    ["resnets.0/Add"] y = Add(x, e4)
    """
    constants = {
        "freqs": noise.uniform(1e-3, 1, (1, 4)).astype(np.float32),
        "w1": noise.normal(size=(4, 5)).astype(np.float32),
        "b1": noise.normal(size=5).astype(np.float32),
        "w2": noise.normal(size=(5, 3)).astype(np.float32),
        "axis": np.array([-1]),
        "last": np.array([2, 3]),
    }
    model = make_graph("float[2,3,4,4] x, int64[1] timestep", "float[2,3,4,4] y", body, constants)
    x = noise.normal(size=(2, 3, 4, 4)).astype(np.float32)
    feeds = [{"x": x, "timestep": np.array([step])} for step in (981, 500, 1)]
    before = [evaluate(model, feed)["y"] for feed in feeds]
    run_passes(model, [FoldTimeEmbedding()], make_context((981, 500, 1)))
    assert not [node for node in model.graph if node.op_type in ("Sin", "MatMul")]
    for feed, expected in zip(feeds, before, strict=True):
        # one and several rows of a product may be summed in another order: some 5 terms of magnitude 10
        np.testing.assert_allclose(evaluate(model, feed)["y"], expected, rtol=0, atol=1e-5)
    assert not np.array_equal(before[0], before[1])


# 2


def test_02_a_merged_adapter_is_the_fake_quant_layer(
    make_graph: MakeGraph, make_context: MakeContext, noise: np.random.Generator
) -> None:
    w0, down, up = (noise.normal(size=shape).astype(np.float32) for shape in ((6, 8), (2, 8), (6, 2)))
    spec = QuantSpec(bits=4, granularity="per_channel")
    merged = torch.from_numpy(w0) + torch.from_numpy(up) @ torch.from_numpy(down)
    scale = weight_scale(merged, spec)
    body = f"""
    ["to_q/MatMul"] delta = MatMul(up, down)
    ["to_q/Add"] w = Add(w0, delta)
    ["to_q.weight_quantizer/FakeQuantize"] wq =
        qdexport.FakeQuantize<qmin: int = {spec.qmin}, qmax: int = {spec.qmax}, axis: int = 0>(w, s, z)
    ["to_q/Transpose"] wt = Transpose<perm: ints = [1,0]>(wq)
    ["to_q/MatMul_1"] y = MatMul(x, wt)
    """
    constants = {"w0": w0, "up": up, "down": down, "s": scale.numpy(), "z": np.zeros((1, 6), np.float32)}
    model = make_graph("float[3,8] x", "float[3,6] y", body, constants)
    # sums of powers of two, which no order of summation rounds, so that codes are seen through the layer
    x = np.eye(8, dtype=np.float32)[:3]
    before = evaluate(model, {"x": x})["y"]
    run_passes(model, [FoldAdapters()], make_context())
    after = evaluate(model, {"x": x})["y"]
    layer = QuantLinear.wrap(nn.Linear(8, 6, bias=False), _identity(), WeightQuantizer(spec, scale))
    layer.weight = nn.Parameter(merged)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(after, expected)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]
    codes = next(iter(model.graph)).inputs[0].const_value.numpy()
    np.testing.assert_array_equal(codes.T, quantize_codes(merged, scale.T, torch.zeros(1), -8, 7).numpy())


def _identity() -> ActivationQuantizer:
    """Passes 0 and 1 exactly."""
    return ActivationQuantizer(QuantSpec(bits=8), torch.ones(1), torch.zeros(1))


# 3


def test_03_integers_are_the_fake_quant_layer_at_padded_borders(
    make_graph: MakeGraph, make_context: MakeContext, noise: np.random.Generator
) -> None:
    """``y = (sum_padded (q - z) w) s_x s_w + b`` in int64, with z far from 0; padding is the real 0."""
    zero, step, weight_step = 37, 2.0**-4, 2.0**-6
    codes = noise.integers(-128, 128, (3, 2, 3, 3))
    bias = (noise.integers(-50, 50, 3) * 2.0**-10).astype(np.float32)
    x = (noise.integers(-300, 300, (1, 2, 5, 5)) * (step / 2)).astype(np.float32)
    body = """
    ["conv.input_quantizer/FakeQuantize"] xq =
        qdexport.FakeQuantize<qmin: int = 0, qmax: int = 255, axis: int = -1>(x, s, z)
    ["conv.weight_quantizer/DequantizeLinear"] w = DequantizeLinear<axis: int = 0>(wc, ws, wz)
    ["conv/Conv"] y = Conv<pads: ints = [1,1,1,1]>(xq, w, b)
    """
    constants = {
        "s": np.float32([step]), "z": np.float32([zero]), "wc": codes.astype(np.int8),
        "ws": np.full(3, weight_step, np.float32), "wz": np.zeros(3, np.int8), "b": bias,
    }  # fmt: skip
    model = make_graph("float[1,2,5,5] x", "float[1,3,5,5] y", body, constants)
    q = np.clip(np.rint(x / np.float32(step)) + zero, 0, 255).astype(np.int64)
    padded = np.pad(q, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=zero)
    expected = np.zeros((1, 3, 5, 5))
    for channel in range(3):
        for row in range(5):
            for column in range(5):
                window = padded[0, :, row : row + 3, column : column + 3] - zero
                total = int((window * codes[channel]).sum())
                expected[0, channel, row, column] = total * step * weight_step + bias[channel]
    # dyadic scales: every sum is exact in FP32, so equality is bit for bit
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], expected.astype(np.float32))
    run_passes(model, [LowerZeroPoint()], make_context())
    quantizers = [node for node in model.graph if node.op_type == "FakeQuantize"]
    assert all(not node.inputs[2].const_value.numpy().any() for node in quantizers)
    np.testing.assert_array_equal(evaluate(model, {"x": x})["y"], expected.astype(np.float32))


# 4


class _Steps(nn.Module):
    """A denoiser of one layer with a row per step, all of whose sums are exact."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randint(-8, 8, (4, 4), generator=torch.Generator().manual_seed(0)) / 8)
        context = StepContext()
        scale = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6])
        inputs = ActivationQuantizer(QuantSpec(bits=6), scale.requires_grad_(), torch.zeros(3), context)
        weights = WeightQuantizer(QuantSpec(bits=8), torch.tensor([2.0**-5]))
        self.layer = QuantLinear.wrap(linear, inputs, weights)
        self.recompute = recompute
        install_step_rows(self, StepRows([900, 500, 100], 1000, context))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False) if self.recompute else self.layer(x)
        return y


@torch.no_grad()
def test_04_scalar_timestep_is_the_per_sample_gather() -> None:
    denoiser, x = _Steps(), torch.randn(3, 4)
    for step in (900, 500, 100):
        scalar = denoiser(x, torch.tensor(step))
        assert torch.equal(denoiser(x, torch.tensor([step])), scalar)
        assert torch.equal(denoiser(x, torch.full((3,), step)), scalar)
    mixed = denoiser(x, torch.tensor([100, 900, 500]))
    for sample_, step in enumerate((100, 900, 500)):
        assert torch.equal(mixed[sample_], denoiser(x, torch.tensor(step))[sample_])
    assert not torch.equal(denoiser(x, torch.tensor(900)), denoiser(x, torch.tensor(100)))


@torch.no_grad()
def test_04_guidance_in_one_call_is_guidance_in_two() -> None:
    denoiser, x = _Steps(), torch.randn(2, 4)
    both = denoiser(torch.cat([x, -x]), torch.tensor([500]))
    assert torch.equal(both, torch.cat([denoiser(x, torch.tensor([500])), denoiser(-x, torch.tensor([500]))]))


def test_04_gradient_checkpointing_uses_the_same_rows() -> None:
    """The layer runs twice per call then; a counter of calls would move on."""
    x = torch.randn(2, 4)
    seen = []
    for recompute in (False, True):
        denoiser = _Steps(recompute=recompute)
        runs = [0]
        denoiser.layer.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        found = []
        for step in (900, 500, 100):
            leaf = x.clone().requires_grad_()
            y = denoiser(leaf, torch.tensor([step]))
            denoiser.layer.weight.grad = None
            y.square().sum().backward()
            assert leaf.grad is not None
            assert denoiser.layer.weight.grad is not None
            found.append((y.detach(), leaf.grad.clone(), denoiser.layer.weight.grad.clone()))
        seen.append(found)
        assert runs[0] == (6 if recompute else 3)
    for plain, recomputed in zip(*seen, strict=True):
        for first, second in zip(plain, recomputed, strict=True):
            assert torch.equal(first, second)


def test_04_a_sampler_of_two_calls_per_step_reads_one_row_twice(tmp_path: Path) -> None:
    model = load_model(save_tiny_pipeline(tmp_path / "heun", "sd", TinyOptions(scheduler="HeunDiscreteScheduler")))
    recipe = _recipe(activation_rows="per_step", calibration={**CALIBRATION, "steps": 3})
    plans = plan_layers(model.denoiser, recipe)
    timesteps = tuple(dict.fromkeys(int(step) for step in _heun_timesteps(model, 3)))
    grow = torch.arange(1.0, 4.0, dtype=torch.float64)
    high = {key: grow for plan in plans for key in activation_keys(plan)}
    ranges = ActivationRanges(low={key: -end for key, end in high.items()}, high=high, timesteps=timesteps)
    quantized = quantize_model(model, plans, recipe, ranges)
    rows: list[int] = []
    quantized.denoiser.get_submodule("conv_in").register_forward_hook(
        lambda *_: rows.append(int(quantized.context.row[0]))  # type: ignore[index]
    )
    sample(model, SampleRequest(prompts=("a",), steps=3, guidance_scale=3.0), denoiser=quantized.denoiser)
    assert rows == [timesteps.index(int(step)) for step in _heun_timesteps(model, 3)]
    assert len(rows) == 5  # a counter would be at row 4 of a table of 3
    assert set(rows) == {0, 1, 2}


def _heun_timesteps(model: LoadedModel, steps: int) -> list[float]:
    scheduler: Any = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(steps)
    return list(scheduler.timesteps.tolist())


# 5


def test_05_gradients_are_those_of_the_formula() -> None:
    x = torch.tensor([-3.0, -1.31, -0.1, 0.0, 0.37, 0.9, 2.6, 9.0])
    s, z, qmin, qmax = 0.25, 2.0, -8, 7
    leaves = [x.clone(), torch.tensor([s]), torch.tensor([z])]
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.arange(1.0, 9.0)
    (fake_quantize(leaves[0], leaves[1], leaves[2], None, qmin, qmax, NO_AXIS) * upstream).sum().backward()
    by_x, by_s, by_z = [], 0.0, 0.0
    for value, g in zip(x.tolist(), upstream.tolist(), strict=True):
        ratio = value / s
        code = round(ratio) + z  # Python rounds half to even
        if code < qmin or code > qmax:
            bound = qmin if code < qmin else qmax
            by_x.append(0.0)
            by_s += g * (bound - z)
            by_z += g * -s
        else:
            by_x.append(g)
            by_s += g * (round(ratio) - ratio)
    assert 0.0 in by_x
    assert any(by_x)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert leaves[2].grad is not None
    assert leaves[0].grad.tolist() == by_x
    # eight FP32 terms up to 100
    assert leaves[1].grad.item() == pytest.approx(by_s, abs=1e-4)
    assert leaves[2].grad.item() == pytest.approx(by_z, abs=1e-5)


# 6


def test_06_a_dead_weight_channel_leaves_the_other_scales_alone() -> None:
    spec = QuantSpec(bits=4, granularity="per_channel")
    weight = torch.randn(5, 3, 3, 3)
    before = weight_scale(weight, spec)
    for dead in (0.0, 1e-30):
        weight[2] = dead
        after = weight_scale(weight, spec)
        keep = [0, 1, 3, 4]
        assert torch.equal(after[:, keep], before[:, keep])
        assert bool(torch.isfinite(after).all())
        assert after[0, 2] > 0
        quantized = fake_quantize_reference(weight, after.reshape(-1, 1, 1, 1), torch.zeros(1), spec.qmin, spec.qmax)
        # half a step is the most that rounding may do
        assert float((quantized - weight)[keep].abs().max()) <= 0.5001 * float(before.max())


# 7


@pytest.mark.parametrize("kind", ["minmax", "ema_minmax", "percentile", "mse"])
def test_07_ranges_do_not_depend_on_requested_widths(kind: str) -> None:
    """1, 2, 2, 2 averaged once per batch is 1.143, whoever asks for which width how often."""
    observers = [make_observer(ObserverSpec.model_validate({"kind": kind}), 1) for _ in range(2)]
    for value in (1.0, 2.0, 2.0, 2.0):
        for observer in observers:
            observer.update(0, torch.linspace(-value, value, 101))
            observer.end_batch()
        for bits in (2, 4, 8):
            observers[0].ranges(QuantSpec(bits=bits))
    for bits in (2, 4, 8):
        asked, fresh = (torch.stack(observer.ranges(QuantSpec(bits=bits))) for observer in observers)
        assert torch.equal(asked, fresh)
        if kind == "ema_minmax":
            assert asked[1].item() == pytest.approx(1 + (1 - 0.95**3), rel=1e-12)


# 8


@pytest.mark.parametrize("bits", [0, 1, 9, 12])
def test_08_widths_that_do_not_exist_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        QuantSpec(bits=bits)
    with pytest.raises(ValueError, match=f"{bits} bits are not possible"):
        LayerBits(weight=bits, activation=8)


@pytest.mark.parametrize("bits", [3, 6])
def test_08_no_other_width_stands_in_for_one_that_was_not_measured(bits: int, tmp_path: Path) -> None:
    """3 bits with the parameters of 2, and 6 with those of 4, is what an index of log2 gives."""
    measured = LayerSensitivity(
        part="weight", name="a", layers=("a",), group="quality", metric="sqnr_db", values={2: 5.0, 4: 20.0, 8: 40.0}
    )
    with pytest.raises(ModelError, match=f"was not measured at {bits} bits, only at 2, 4, 8"):
        measured.at(bits)
    spec = QuantSpec(bits=bits, granularity="per_channel")
    assert (spec.qmin, spec.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = torch.randn(2, 5)
    scales = [weight_scale(weight, QuantSpec(bits=other, granularity="per_channel")) for other in range(2, 9)]
    assert all(not torch.equal(weight_scale(weight, spec), s) for n, s in enumerate(scales, 2) if n != bits)
    text = (
        "model: a\nrecipe: r\naverage_weight_bits: 8\naverage_activation_bits: 8\n"
        f"layers:\n  a: {{weight: {bits + 6}, activation: 8}}\n"
    )
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"{bits + 6} bits are not possible"):
        BitPlan.load(tmp_path / "plan.yaml")


# 9


def test_09_zeroed_negative_prompts_are_told_from_the_first_token(
    make_graph: MakeGraph, make_context: MakeContext, noise: np.random.Generator
) -> None:
    bos = (noise.normal(size=8) * 50).astype(np.float32)
    weight, bias = noise.normal(size=(8, 3)).astype(np.float32), noise.normal(size=3).astype(np.float32)
    body = """
    ["to_k.first_token/Slice"] token = Slice(x, zero, one, one)
    ["to_k/Slice"] rest = Slice(x, one, end, one)
    ["to_k/MatMul"] k1 = MatMul(rest, w)
    ["to_k.first_token/MatMul"] k0m = MatMul(token, w)
    ["to_k.first_token/Add"] k0 = Add(k0m, b)
    ["to_k.first_token/Concat"] y = Concat<axis: int = 1>(k0, k1)
    """
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "end": np.array([2**62]), "w": weight, "b": bias,
    }  # fmt: skip
    model = make_graph("float[4,5,8] x", "float[4,5,3] y", body, constants)
    x = noise.normal(size=(4, 5, 8)).astype(np.float32)
    x[0] = 0  # force_zeros_for_empty_prompt
    x[1, 0] = x[2, 0] = bos
    before = evaluate(model, {"x": x})["y"]
    run_passes(model, [PrecomputeBos()], make_context(None, bos))
    after = evaluate(model, {"x": x})["y"]
    np.testing.assert_array_equal(after[0, 0], bias)
    # the constant is computed in FP64, the layer in FP32: 8 products of magnitude 200
    np.testing.assert_allclose(after[:3, 0], before[:3, 0], rtol=0, atol=2e-4)
    assert np.abs(before[1, 0] - bias).max() > 1  # substituting one for the other would show
    np.testing.assert_array_equal(after[:3, 1:], before[:3, 1:])
    assert np.isnan(after[3]).all()  # some other token cannot pass as either


# 10


def test_10_allocated_averages_keep_their_targets_in_each_group(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: np.random.Generator
) -> None:
    recipe = _recipe(bit_allocation={"weight_target": 5.0, "activation_target": 6.5})
    settings = recipe.bit_allocation
    assert settings is not None
    plans = plan_model(tiny, recipe)
    quantized = [plan for plan in plans if plan.quantized]

    def entries(part: Any, named: Mapping[str, list[str]], widths: tuple[int, ...]) -> list[LayerSensitivity]:
        return [
            LayerSensitivity(
                part=part,
                name=name,
                layers=tuple(layers),
                group=(group := group_of(layers, settings.content)),
                metric="ssim" if group == "content" else "sqnr_db",
                values={bits: float(bits + noise.normal()) for bits in widths},
            )
            for name, layers in named.items()
        ]

    by_group: dict[str, list[str]] = {}
    for plan in quantized:
        by_group.setdefault(plan.group, []).append(plan.name)
    table = SensitivityTable(
        model="tiny",
        recipe="test",
        entries=tuple(
            entries("weight", {plan.name: [plan.name] for plan in quantized}, (2, 4, 8))
            + entries("activation", by_group, (4, 8))
        ),
    )
    compared: list[int] = []

    def compare(_loaded: Any, candidates: Any, *_: Any) -> list[float]:
        compared.append(len(candidates))
        return [1.0 / (1 + index) for index in range(len(candidates))]

    monkeypatch.setattr(allocation, "measure_sensitivity", lambda *_: table)
    monkeypatch.setattr(allocation, "compare_plans", compare)
    found = allocation.allocate(
        tiny, plans, recipe, given_ranges(plans, -1, 1), TARGETS["tensorrt-rtx"], SweepRun(folder=tmp_path)
    )
    assert len(compared) == 2
    shapes = layer_shapes(tiny.denoiser, plans)
    chosen = {item.part: item for item in found.scanned if item.chosen}
    for part in ("weight", "activation"):
        sizes: dict[str, float] = dict.fromkeys(("content", "quality"), 0.0)
        bits: dict[str, float] = dict.fromkeys(("content", "quality"), 0.0)
        members: dict[str, list[str]] = {}
        for plan in plans:
            if plan.name in shapes:
                members.setdefault(plan.name if part == "weight" else plan.group or plan.name, []).append(plan.name)
        for layers in members.values():
            width = getattr(found.plan.layers[layers[0]], part)
            size = shapes[layers[0]].weights if part == "weight" else shapes[layers[0]].inputs
            group = group_of(layers, settings.content)
            sizes[group] += size
            bits[group] += size * width
        ratio = sizes["content"] / sizes["quality"]
        budgets = split_budget(chosen[part].level, ratio, chosen[part].split)
        for group, budget in zip(("content", "quality"), budgets, strict=True):
            assert abs(bits[group] / sizes[group] - budget) <= 0.02 + 1e-9, (part, group)
        average = sum(bits.values()) / sum(sizes.values())
        assert abs(average - chosen[part].level) <= 0.02 + 1e-9
        assert average <= {"weight": 5.02, "activation": 6.52}[part]


# 11


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_11_packed_codes_come_back(bits: int, signed: bool) -> None:
    spec = QuantSpec(bits=bits, signed=signed)
    every = np.arange(spec.qmin, spec.qmax + 1)
    codes = np.concatenate([every, every[::-1], every[:1]]).astype(np.int8 if signed else np.uint8)  # an odd count
    if bits == 8 and not signed:
        assert 200 in codes  # which becomes -56 where codes are cast to signed bytes
    packed = pack_codes(codes, spec)
    assert packed.nbytes == (codes.size if bits > 4 else (codes.size + 1) // 2)
    back = unpack_codes(packed, spec, codes.shape)
    assert back.dtype == codes.dtype
    assert np.array_equal(back.astype(int), codes.astype(int))


# 12


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_12_zero_points_are_integers(bits: int) -> None:
    spec = QuantSpec(bits=bits, symmetric=False, signed=False)
    low, high = -torch.rand(500) * 3, torch.rand(500) * 5
    scale, zero = parameters_from_range(low, high, spec)
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= spec.qmin) & (zero <= spec.qmax)).all())
    # so that 0, and with it the padding, is exact
    nothing = fake_quantize_reference(torch.zeros(500), scale, zero, spec.qmin, spec.qmax)
    assert torch.equal(nothing, torch.zeros(500))


def test_12_exported_zero_points_are_integers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = loaded_from_denoiser(random_unet("tiny_unet2d"), name="tiny")
    recipe = _recipe()
    plans = plan_layers(base.denoiser, recipe)
    model = quantize_model(base, plans, recipe, given_ranges(plans, -1.2345, 5.4321))
    save_quantized(model, tmp_path / "checkpoint", with_weights=False)
    stored = load_file(tmp_path / "checkpoint" / QUANTIZATION_FILE)
    zeros = [tensor for name, tensor in stored.items() if name.endswith(".input_zero_point")]
    assert len(zeros) == sum(len(plan.parts) for plan in plans if plan.quantized)
    assert all(tensor.tolist() == [round(1.2345 / ((1.2345 + 5.4321) / 255))] for tensor in zeros)
