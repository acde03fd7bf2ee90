"""Small fake-quant modules through torch.export: same numbers, same codes, module paths as names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qdexport.capture.export import Captured, capture
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.spec import Granularity, QuantSpec
from qdexport.errors import CaptureError
from qdexport.graph.dialect import STEP_ROWS
from qdexport.graph.evaluate import evaluate, fake_quantize_codes, subgraph
from qdexport.graph.query import const_of, int_attr, is_fake_quantize, module_of
from qdexport.quant.affine import quantize_codes
from qdexport.quant.modules import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    StepContext,
    StepRows,
    WeightQuantizer,
    install_step_rows,
)

ACTIVATION = QuantSpec(bits=8, symmetric=False, signed=False)
WEIGHT = QuantSpec(bits=4, granularity=Granularity.PER_CHANNEL)
STEPS = [900, 300, 10]


def static(low: int, best: int | None = None, high: int | None = None, name: str = "") -> Dim:
    return Dim(name=name, low=low, best=best or low, high=high or low)


def io_of(batch: Dim, dtype: str = "float32") -> IoSpec:
    sample = (batch, static(4), static(6), static(6))
    return IoSpec(
        inputs=(
            TensorSpec(name="sample", role="sample", dtype=dtype, dims=sample),
            TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(static(1),)),
        ),
        outputs=(TensorSpec(name="noise_pred", role="prediction", dtype=dtype, dims=sample),),
    )


def activation(rows: int, context: StepContext | None) -> ActivationQuantizer:
    scale = torch.tensor([0.021, 0.013, 0.04][:rows])
    return ActivationQuantizer(ACTIVATION, scale, torch.tensor([120.0, 131, 90][:rows]), context)


def weight(layer: nn.Module, start: int = 0, stop: int | None = None) -> WeightQuantizer:
    part = layer.weight[:, start:stop].detach()
    return WeightQuantizer(WEIGHT, part.abs().flatten(1).amax(1)[None] / WEIGHT.qmax)


class Block(nn.Module):
    """A convolution, a split convolution over two halves, and a linear layer, in a list that is sliced."""

    def __init__(self, rows: int, context: StepContext | None) -> None:
        super().__init__()
        conv, shortcut, linear = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(10, 4, 1), nn.Linear(4, 4)
        self.conv = QuantConv2d.wrap(conv, activation(rows, context), weight(conv))
        self.shortcut = QuantSplitConv2d.wrap(
            shortcut,
            (6, 4),
            [activation(1, None), activation(rows, context)],
            [weight(shortcut, 0, 6), weight(shortcut, 6)],
        )
        self.to_q = QuantLinear.wrap(linear, activation(rows, context), weight(linear))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(torch.cat([self.conv(x), x], dim=1))
        return self.to_q(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Toy(nn.Module):
    """Has the call signature of a diffusers denoiser."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.context = StepContext() if rows > 1 else None
        self.blocks = nn.ModuleList([nn.Identity(), Block(rows, self.context), Block(rows, self.context)])
        if self.context is not None:
            install_step_rows(self, StepRows(STEPS, 1000, self.context))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        for block in self.blocks[1:]:
            sample = block(sample)
        return (sample,)


def toy(rows: int = 3, dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(5)
    model = Toy(rows).eval()
    for module in model.modules():  # quantizers stay FP32, as the library keeps them
        if isinstance(module, nn.Conv2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


def values(captured: Captured, nodes: list[ir.Node], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    part = subgraph(captured.model, list(captured.model.graph.inputs), [node.outputs[0] for node in nodes])
    return list(evaluate(part, feeds).values())


@pytest.mark.parametrize("rows", [1, 3])
def test_codes_and_outputs_are_those_of_torch(noise: np.random.Generator, rows: int) -> None:
    model = toy(rows)
    captured = capture(model, io_of(static(2)))
    proto = ir.to_proto(captured.model)
    onnx.checker.check_model(proto, full_check=True)
    assert [item.name for item in proto.graph.input] == ["sample", "timestep"][: len(proto.graph.input)]
    assert [item.name for item in proto.graph.output] == ["noise_pred"]
    x = noise.normal(size=(2, 4, 6, 6)).astype(np.float32)
    quantizer = next(
        node for node in captured.model.graph
        if is_fake_quantize(node) and module_of(node) == "blocks.1.conv.input_quantizer"
    )  # fmt: skip
    assert len([value for value in quantizer.inputs if value is not None]) == (4 if rows > 1 else 3)
    for step in (*STEPS, 620, 0, 999):
        feeds = {"sample": x, "timestep": np.array([step])}
        with torch.no_grad():
            (expected,) = model(torch.from_numpy(x), torch.tensor([step]))
        (y,) = evaluate(captured.model, feeds).values()
        # FP32 sums of 36 products in another order; a code that such a difference flips would show as 0.01
        np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=2e-5)
        first = model.blocks[1].conv.input_quantizer
        row = 0 if rows == 1 else int(np.abs(np.array(STEPS) - step).argmin())
        s, z = first.scale[row], first.zero_point[row]
        codes = fake_quantize_codes(x, s.numpy(), z.numpy(), 0, 255)
        np.testing.assert_array_equal(codes, quantize_codes(torch.from_numpy(x), s, z, 0, 255).numpy())
        (found,) = values(captured, [quantizer], feeds)
        np.testing.assert_array_equal(found, (codes - z.numpy()) * s.numpy())


def test_names_are_torch_module_paths() -> None:
    captured = capture(toy(), io_of(static(2)))
    nodes = {node.name: node for node in captured.model.graph}
    for block in ("blocks.1", "blocks.2"):
        for layer in ("conv/Conv", "shortcut#0/Conv", "shortcut#1/Conv", "to_q/MatMul"):
            assert f"{block}.{layer}" in nodes
        assert f"{block}.conv.input_quantizer/FakeQuantize" in nodes
        assert f"{block}.shortcut.weight_quantizers.1/FakeQuantize" in nodes
    rows = {
        node.inputs[3].producer()
        for node in nodes.values()
        if is_fake_quantize(node) and len(node.inputs) > 3
    }
    assert [module_of(node) for node in rows] == [STEP_ROWS]  # one lookup serves all quantizers
    assert not any("pkg" in key for node in nodes.values() for key in node.metadata_props)


def test_weights_keep_their_quantizers() -> None:
    model = toy()
    captured = capture(model, io_of(static(2)))
    node = next(
        node for node in captured.model.graph if node.name == "blocks.1.conv.weight_quantizer/FakeQuantize"
    )
    layer = model.blocks[1].conv
    np.testing.assert_array_equal(const_of(node, 0), layer.weight.detach().numpy())
    np.testing.assert_array_equal(const_of(node, 1), layer.weight_quantizer.scale.numpy())
    assert [int_attr(node, key) for key in ("qmin", "qmax", "axis")] == [-8, 7, 0]


class Twice(nn.Module):
    """Calls one layer on one input in two places, with factors of its columns, as DiT calls its first embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("factors", torch.linspace(0.5, 2, width))
        self.quantizer = weight(self.linear)

    def embed(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantizer(self.linear.weight * self.factors))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        del timestep, return_dict
        x = sample.flatten(2)
        return ((self.embed(x) + nn.functional.silu(self.embed(x))).reshape(sample.shape),)


def test_a_layer_that_is_called_twice_on_one_input_is_one_layer() -> None:
    """Each call folds the product of 1,296 weights and their factors into a constant of its own."""
    graph = capture(Twice(6 * 6).eval(), io_of(static(2))).model.graph
    assert len([node for node in graph if node.op_type in {"MatMul", "Gemm"}]) == 1
    assert len([node for node in graph if is_fake_quantize(node)]) == 1


def test_a_half_precision_body(noise: np.random.Generator) -> None:
    model = toy(dtype=torch.float16)
    captured = capture(model, io_of(static(2), "float16"))
    quantizer = next(node for node in captured.model.graph if is_fake_quantize(node))
    assert quantizer.inputs[1].dtype == ir.DataType.FLOAT
    assert {node.outputs[0].dtype for node in captured.model.graph if node.op_type == "Conv"} == {
        ir.DataType.FLOAT16
    }
    x = noise.normal(size=(2, 4, 6, 6)).astype(np.float16)
    (y,) = evaluate(captured.model, {"sample": x, "timestep": np.array([300])}).values()
    assert y.dtype == np.float16
    assert np.isfinite(y).all()


@pytest.mark.parametrize("high", [2, 8])  # of 1 to 2 torch would leave 2 alone
def test_a_dynamic_batch(high: int, noise: np.random.Generator) -> None:
    model = toy()
    captured = capture(model, io_of(static(1, 2, high, name="batch")))
    batch = captured.model.graph.inputs[0].shape[0]
    assert not isinstance(batch, int)
    assert captured.model.graph.outputs[0].shape[0] == batch
    for size in (1, 2, high):
        x = noise.normal(size=(size, 4, 6, 6)).astype(np.float32)
        with torch.no_grad():
            (expected,) = model(torch.from_numpy(x), torch.tensor([10]))
        (y,) = evaluate(captured.model, {"sample": x, "timestep": np.array([10])}).values()
        np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=2e-5)  # as above


class DataDependent(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (sample * 2 if bool(sample.sum() > 0) else sample,)


def test_what_torch_cannot_trace_is_named() -> None:
    with pytest.raises(CaptureError, match=r"torch\.export cannot trace DataDependent: "):
        capture(DataDependent().eval(), io_of(static(2)))
