"""A network with dynamic dimensions is compared at every end of every profile, so that a wrong size is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qdexport.check.shapes import call_at, shape_parity, shape_points
from qdexport.check.verdict import judge, shape_problems
from qdexport.core.io_spec import Dim, IoSpec, Profile, TensorSpec
from qdexport.core.results import EndToEnd, ShapeParity
from qdexport.core.spec import LayerPlan
from qdexport.core.target import target_named
from qdexport.errors import ParityError
from qdexport.models.load import LoadedModel, loaded_from_denoiser
from qdexport.models.sampling import DenoiserCall
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import QuantizedModel, quantize_model
from qdexport.quant.bos import Bos
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.softmax import SoftmaxParameters
from tests.check.conftest import NARROW, UNSIGNED, recipe_of

SIZES = {"batch": (1, 2, 3), "height": (4, 8, 12), "tokens": (3, 16, 20)}
PROFILES = [{"name": "small", "batch": 1, "height": (4, 8), "tokens": 3}, {"batch": (2, 3), "height": (8, 8, 12)}]


def dim(low: int, best: int, high: int, name: str = "") -> Dim:
    return Dim(name=name, low=low, best=best, high=high)


def test_each_shape_once() -> None:
    batch, side = dim(1, 2, 4, "batch"), dim(8, 8, 16, "height")
    sample = TensorSpec(name="sample", role="sample", dtype="float32", dims=(batch, side))
    io = IoSpec(inputs=(sample,), outputs=())
    assert [(p.profile, p.end, p.sizes) for p in shape_points(io)] == [
        ("0", "low", {"batch": 1, "height": 8}),
        ("0", "best", {"batch": 2, "height": 8}),
        ("0", "high", {"batch": 4, "height": 16}),
    ]
    one = Profile(name="a", dims=(dim(1, 1, 1, "batch"), dim(8, 8, 8, "height")))
    two = Profile(name="b", dims=(dim(1, 4, 4, "batch"), dim(8, 8, 8, "height")))
    points = shape_points(io.model_copy(update={"profiles": (one, two)}))
    assert [(p.profile, p.end) for p in points] == [("a", "low"), ("b", "best")]
    assert shape_points(io.at({})) == []


def test_a_call_is_cut_or_begins_again() -> None:
    text = TensorSpec(name="text", role="text", dtype="float16", dims=(dim(3, 3, 3), dim(2, 2, 2), dim(1, 1, 1)))
    call = DenoiserCall(step=0, timestep=9, inputs={"text": torch.arange(6.0).reshape(2, 3, 1)}, batch=0)
    fitted = call_at(call, IoSpec(inputs=(text,), outputs=())).inputs["text"]
    assert fitted.dtype == torch.float16
    assert fitted.squeeze(2).tolist() == [[0, 1], [3, 4], [0, 1]]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedModel, Path, IoSpec]:
    """Scales per step, zero points, log2 softmax and a constant first token, with dynamic batch, height and tokens."""
    rules = [{"match": "*", "activation": UNSIGNED}, {"match": "*.ff.*", "activation": NARROW}]
    recipe = recipe_of(
        rules,
        activation_rows="per_step",
        softmax={"bits": 8, "mode": "log2"},
        bos="constant",
        shapes={**SIZES, "profiles": PROFILES},
    )
    # one attention block, one halving: torch.export takes its time with symbolic sizes
    changes = {"mid_block_type": None, "block_out_channels": (8, 8), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    loaded = loaded_from_denoiser(random_unet("tiny_sd", **changes), name="tiny")
    plans = plan_model(loaded, recipe)
    # TensorRT-RTX has the passes that change shapes: sequence-first and expand-group-norm
    model = quantize_model(loaded, plans, recipe, ranges_of(plans, loaded))
    lowered = lower_to_onnx(model, tmp_path_factory.mktemp("dynamic") / "onnx", target_named("tensorrt-rtx"))
    return model, lowered.file.path, lowered.facts.io


def ranges_of(plans: list[LayerPlan], loaded: LoadedModel) -> ActivationRanges:
    """One range per row for every input, and what stands behind the softmax of every attention block."""
    rows = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    keys = [key for plan in plans for key in activation_keys(plan)]
    softmax = SoftmaxParameters(bits=8, scale=torch.tensor([1.0, 0.5, 1.0]), mode=torch.ones(3))
    blocks = [name for name, _ in loaded.denoiser.named_modules() if name.endswith((".attn1", ".attn2"))]
    return ActivationRanges(
        low=dict.fromkeys(keys, -3 * rows),
        high=dict.fromkeys(keys, 4 * rows),
        timesteps=(900, 500, 10),
        softmax=dict.fromkeys(blocks, softmax),
        bos=Bos(embedding=torch.linspace(-2, 3, 16), encoder=""),
    )


def calls_of(model: QuantizedModel, io: IoSpec) -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        spec.name: torch.randn(spec.shape(), generator=generator).to(getattr(torch, spec.dtype))
        for spec in io.inputs
        if spec.role != "timestep"
    }
    assert model.bos is not None
    inputs["encoder_hidden_states"][:, 0] = model.bos.embedding
    step = int(model.timesteps[0])
    return [DenoiserCall(step=0, timestep=step, inputs={**inputs, "timestep": torch.tensor([step])}, batch=0)]


@pytest.mark.slow
def test_every_shape_agrees(dynamic: tuple[QuantizedModel, Path, IoSpec]) -> None:
    model, path, io = dynamic
    found, used = shape_parity(model, path, io, calls_of(model, io))
    assert [(item.profile, item.end, item.sizes) for item in found] == [
        ("small", "low", {"batch": 1, "height": 4, "tokens": 3}),
        ("small", "best", {"batch": 1, "height": 8, "tokens": 3}),
        ("1", "low", {"batch": 2, "height": 8, "tokens": 3}),
        ("1", "best", {"batch": 2, "height": 8, "tokens": 16}),
        ("1", "high", {"batch": 3, "height": 12, "tokens": 20}),
    ]
    assert all(item.code_flip_rate == 0 and not item.problems and item.layers > 20 for item in found)
    assert [shape_problems(item) for item in found] == [[]] * 5
    assert [tuple(call.inputs["sample"].shape) for call in used] == [
        (1, 4, 4, 8), (1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8), (3, 4, 12, 8),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_size_that_was_frozen_is_found(dynamic: tuple[QuantizedModel, Path, IoSpec], tmp_path: Path) -> None:
    """A Reshape with the sizes of one shape runs at that shape alone."""
    model, path, io = dynamic
    proto = onnx.load(path)
    frozen = next(node for node in proto.graph.node if node.op_type == "Reshape" and ".attn1" in node.name)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.int64([2, 8, -1]), "frozen"))
    frozen.input[1] = "frozen"
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"Reshape|shape"):
        shape_parity(model, tmp_path / "model.onnx", io, calls_of(model, io))


def shape(**changes: object) -> ShapeParity:
    known = {"profile": "a", "end": "high", "sizes": {"batch": 4, "height": 64}, "timestep": 1, "layers": 9}
    numbers = {"sqnr_db": 120.0, "code_flip_rate": 0.0, "whole_sqnr_db": 25.0, "noise_floor_db": 60.0}
    return ShapeParity.model_validate({**known, **numbers, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problems": ["integer weights differ in 1 layer"]}, "integer weights differ in 1 layer"),
    ],
)
def test_a_shape_that_fails_fails_the_network(changes: dict[str, object], reason: str) -> None:
    whole = EndToEnd(sqnr_db=40.0, noise_floor_db=40.0)
    layers = [*judge([], whole, "fp32", "r").layers]
    assert shape_problems(shape()) == []
    parity = judge(layers, whole, "fp32", "r", [shape(), shape(**changes)])
    assert parity.verdict == "fail"
    assert f"at batch 4, height 64 (profile a, high): {reason}" in parity.reasons
