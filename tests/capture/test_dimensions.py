"""Dynamic dimensions of a captured graph have the names of its inputs', in the simplest form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qdexport.quant.ops
from qdexport.capture.export import Captured, capture
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.errors import CaptureError
from qdexport.graph.evaluate import evaluate

assert qdexport.quant.ops  # registers the operator that capture translates


def io_of(high: int = 32) -> IoSpec:
    height, tokens = Dim(name="height", low=8, best=16, high=high), Dim(name="tokens", low=2, best=5, high=9)
    two, four = Dim(low=2, best=2, high=2), Dim(low=4, best=4, high=4)
    sample = (two, four, height, Dim(low=8, best=8, high=8))
    return IoSpec(
        inputs=(
            TensorSpec(name="sample", role="sample", dtype="float32", dims=sample),
            TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(Dim(low=1, best=1, high=1),)),
            TensorSpec(name="encoder_hidden_states", role="text", dtype="float32", dims=(two, tokens, four)),
        ),
        outputs=(TensorSpec(name="noise_pred", role="prediction", dtype="float32", dims=sample),),
    )


class Hourglass(nn.Module):
    """Halves and doubles the height, joins it with the input, and attends to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        low = self.norm(self.down(sample))
        high = nn.functional.interpolate(low, scale_factor=2.0, mode="nearest")
        tokens = (high + sample).permute(0, 2, 3, 1).reshape(2, 1, -1, 4)
        text = encoder_hidden_states.unsqueeze(1)  # one head
        read = nn.functional.scaled_dot_product_attention(tokens, text, text)
        return (read.reshape(2, sample.shape[2], 8, 4).permute(0, 3, 1, 2),)


@pytest.fixture(scope="module")
def hourglass() -> tuple[Hourglass, Captured]:
    torch.manual_seed(0)
    model = Hourglass().eval()
    return model, capture(model, io_of())


def test_names_are_those_of_the_inputs(hourglass: tuple[Hourglass, Captured]) -> None:
    graph = hourglass[1].model.graph
    shapes = {str(value.shape) for node in graph for value in node.outputs if value.shape is not None}
    assert str(graph.inputs[0].shape) == "[2,4,height,8]"
    assert str(graph.outputs[0].shape) == "[2,4,height,8]"
    assert {"[2,4,height/2,4]", "[2,1,8*height,4]", "[2,1,8*height,tokens]"} <= shapes
    assert not any("//" in shape or "unk__" in shape for shape in shapes)
    # what the exporter left open behind the normalization is known again
    conv = next(node for node in graph if node.op_type == "Resize")
    assert str(conv.inputs[0].shape) == "[2,4,height/2,4]"


@pytest.mark.parametrize(("height", "tokens"), [(8, 2), (16, 5), (32, 9)])
def test_numbers_are_those_of_torch_at_every_size(
    hourglass: tuple[Hourglass, Captured], noise: np.random.Generator, height: int, tokens: int
) -> None:
    model, captured = hourglass
    x, text = (noise.normal(size=size).astype(np.float32) for size in ((2, 4, height, 8), (2, tokens, 4)))
    with torch.no_grad():
        (expected,) = model(torch.from_numpy(x), torch.tensor([1]), torch.from_numpy(text))
    feeds = {"sample": x, "timestep": np.array([1]), "encoder_hidden_states": text}
    used = {value.name for value in captured.model.graph.inputs}
    (y,) = evaluate(captured.model, {name: array for name, array in feeds.items() if name in used}).values()
    # FP32 sums of some tens of numbers of order 1, in another order
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=2e-5)


class FixedHeight(nn.Module):
    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (sample.reshape(2, 4, 16, 8) + encoder_hidden_states.sum(),)


def test_a_model_that_fixes_a_size_is_refused() -> None:
    with pytest.raises(CaptureError, match="the model works at some sizes of height only: give each one number"):
        capture(FixedHeight().eval(), io_of())


def test_fixed_shapes_are_left_alone() -> None:
    captured = capture(Hourglass().eval(), io_of().at({}))
    dims = [dim for node in captured.model.graph for out in node.outputs for dim in out.shape or ()]
    assert all(isinstance(dim, int) for dim in dims)
    assert isinstance(captured.model, ir.Model)
