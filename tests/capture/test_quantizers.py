"""Quantizers that are put back into a graph: the same graph, bit for bit, as when they are traced."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qdexport.capture.export
from qdexport.capture.export import capture
from qdexport.capture.quantizers import put_back, take_off
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.spec import Granularity, QuantSpec
from qdexport.graph.evaluate import evaluate
from qdexport.graph.query import is_fake_quantize
from qdexport.quant.modules import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    StepContext,
    StepRows,
    WeightQuantizer,
    install_step_rows,
)

ACTIVATION = QuantSpec(bits=8, symmetric=False, signed=False)
PER_CHANNEL = QuantSpec(bits=6, granularity=Granularity.PER_CHANNEL)
PER_TENSOR = QuantSpec(bits=8)
STEPS = [900, 300, 10]


def fixed(*sizes: int) -> tuple[Dim, ...]:
    return tuple(Dim(low=size, best=size, high=size) for size in sizes)


IO = IoSpec(
    inputs=(
        TensorSpec(name="sample", role="sample", dtype="float32", dims=fixed(2, 4, 6, 6)),
        TensorSpec(name="timestep", role="timestep", dtype="int64", dims=fixed(1)),
    ),
    outputs=(TensorSpec(name="noise_pred", role="prediction", dtype="float32", dims=fixed(2, 4, 6, 6)),),
)


def activation(rows: int, context: StepContext | None = None) -> ActivationQuantizer:
    scale = torch.tensor([0.021, 0.013, 0.04][:rows])
    return ActivationQuantizer(ACTIVATION, scale, torch.tensor([120.0, 131, 90][:rows]), context)


def weights(layer: nn.Conv2d | nn.Linear, spec: QuantSpec = PER_CHANNEL) -> WeightQuantizer:
    reach = layer.weight.detach().abs().flatten(1).amax(1)
    scale = reach[None] / spec.qmax if spec.granularity is Granularity.PER_CHANNEL else reach.amax()[None] / spec.qmax
    return WeightQuantizer(spec, scale)


class WithAdapter(QuantLinear):
    """A class that the library does not know: its quantizers must be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(2 * self.weight), self.bias)


class Network(nn.Module):
    """A convolution; q and k that share a quantizer; a wide layer; a layer on a vector."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        context = StepContext() if rows > 1 else None
        conv, q, k = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        wide, vector, last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        shared = activation(rows, context)
        self.conv = QuantConv2d.wrap(conv, activation(rows, context), weights(conv))
        self.to_q = QuantLinear.wrap(q, shared, weights(q))
        self.to_k = QuantLinear.wrap(k, shared, weights(k, PER_TENSOR))
        self.wide = QuantLinear.wrap(wide, activation(1), weights(wide))
        self.vector = QuantLinear.wrap(vector, activation(rows, context), weights(vector))
        self.last = WithAdapter.wrap(last, activation(rows, context), weights(last))
        if context is not None:
            install_step_rows(self, StepRows(STEPS, 1000, context))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        del timestep, return_dict
        y = self.conv(sample).permute(0, 2, 3, 1)
        y = self.to_q(y) * self.to_k(y)
        pooled = self.vector(self.wide(y).mean(dim=(1, 2)))
        return (self.last(y + pooled[:, None, None]).permute(0, 3, 1, 2),)


def traced(denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    """The capture with every quantizer traced."""
    with monkeypatch.context() as patch:
        patch.setattr(qdexport.capture.export, "take_off", lambda module: (module, {}))
        return capture(denoiser, IO).model


def operators(model: ir.Model) -> collections.Counter[tuple[str, str]]:
    return collections.Counter((node.op_type, node.metadata_props["qdexport.module"]) for node in model.graph)


def predictions(model: ir.Model, step: int) -> np.ndarray:
    sample = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    return evaluate(model, {"sample": sample, "timestep": np.array([step], np.int64)})["noise_pred"]


@pytest.mark.parametrize("rows", [1, 3])
def test_the_graph_is_the_traced_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(rows).eval()
    want, got = traced(network, monkeypatch), capture(network, IO).model
    assert operators(got) == operators(want)
    assert [value.name for value in got.graph.outputs] == ["noise_pred"]
    for step in STEPS:
        assert np.array_equal(predictions(got, step), predictions(want, step))


def test_the_denoiser_keeps_its_quantizers() -> None:
    network = Network(3).eval()
    names = [name for name, _ in network.named_modules()]
    plain, layers = take_off(network)
    assert [name for name, _ in network.named_modules()] == names
    assert list(layers) == ["conv", "to_q", "to_k", "wide", "vector"]
    assert all(type(plain.get_submodule(name)) in (nn.Conv2d, nn.Linear) for name in layers)
    assert plain.get_submodule("conv").weight is network.conv.weight


def test_nothing_to_take_off() -> None:
    linear = nn.Sequential(nn.Linear(4, 4))
    assert take_off(linear) == (linear, {})


def test_watched_layers_are_traced() -> None:
    network = Network(1).eval()
    network.wide.input_quantizer.register_forward_pre_hook(lambda module, args: None)
    assert "wide" not in take_off(network)[1]


def test_layers_without_an_operator_are_named_and_nothing_changes() -> None:
    network = Network(1).eval()
    plain, layers = take_off(network)
    model = capture(plain, IO).model
    before = [node.name for node in model.graph]
    assert put_back(model, {**layers, "gone": network.to_q}, None) == ["gone"]
    assert [node.name for node in model.graph] == before
    # a table of scales, and no row to read it with
    assert put_back(model, take_off(Network(3).eval())[1], None) == ["conv", "to_q", "to_k", "vector"]


def test_equal_layers_become_one_operator_and_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(1).eval()
    network.to_k.weight.data.copy_(network.to_q.weight)  # the same product, with different quantizers
    plain, layers = take_off(network)
    assert put_back(capture(plain, IO).model, layers, None) == ["to_k"]
    want, got = traced(network, monkeypatch), capture(network, IO).model
    assert operators(got) == operators(want)
    assert np.array_equal(predictions(got, 300), predictions(want, 300))
    assert sum(is_fake_quantize(node) for node in got.graph) == 11
