from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qdexport.check.calls import check_calls
from qdexport.check.float64.parity import float64_parity
from qdexport.core.results import Float64Parity
from qdexport.core.target import target_named
from qdexport.emit.facts import read_network_facts
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import quantize_model
from qdexport.quant.modules import quantizer_pairs
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges
from qdexport.quant.softmax import SoftmaxParameters
from tests.check.conftest import UNSIGNED, Compiled, recipe_of
from tests.check.test_parity import constant, set_constant

Edit = Callable[[onnx.ModelProto], None]


def measured(compiled: Compiled, edit: Edit | None, folder: Path, calls: int = 1) -> Float64Parity:
    path = compiled.path
    if edit is not None:
        proto = onnx.load(path)
        edit(proto)
        path = folder / "model.onnx"
        onnx.save(proto, path)
    return float64_parity(compiled.model, path, read_network_facts(path), compiled.calls[:calls])


def named(proto: onnx.ModelProto, start: str) -> str:
    return next(item.name for item in proto.graph.initializer if item.name.startswith(start))


def scaled(start: str, place: tuple[slice | int, ...], factor: float) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        name = named(proto, start)
        array = constant(proto, name).copy()
        array[place] = array[place] * array.dtype.type(factor)
        set_constant(proto, name, array)

    return edit


def replaced_row(start: str, row: int, by: int) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        name = named(proto, start)
        array = constant(proto, name).copy()
        array[row] = array[by]
        set_constant(proto, name, array)

    return edit


def operand_scaled(node_name: str, index: int, factor: float) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        node = next(item for item in proto.graph.node if item.name.startswith(node_name))
        array = constant(proto, node.input[index])
        copy = f"{node.input[index]}_changed"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array * array.dtype.type(factor), copy))
        node.input[index] = copy

    return edit


def exchanged_inputs(node_name: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        node = next(item for item in proto.graph.node if item.name.startswith(node_name))
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return edit


@pytest.mark.parametrize("kind", ["static", "stepped"])
def test_a_right_file_is_the_same_function(
    kind: str, static: Compiled, stepped: Compiled, tmp_path: Path
) -> None:
    compiled = {"static": static, "stepped": stepped}[kind]
    found = measured(compiled, None, tmp_path, calls=3)
    assert (found.problems, found.notes, found.calls) == ([], [], 3)
    # constants that a pass rounds anew are off by 2^-24; FP16 ones are PyTorch's, or exactly roundings of its numbers
    assert found.sqnr_db > 130
    assert found.rows["time table"] == 3
    assert found.rows["timesteps without a row"] == 997
    if kind == "stepped":
        assert found.rows["timesteps of activation rows"] == 1000
        assert found.rows["rows of layers"] == 3 * sum(len(plan.parts) for plan in _with_rows(compiled))


def _with_rows(compiled: Compiled) -> list[Any]:
    plans = [plan for plan in compiled.model.plans if plan.quantized]
    layers = [compiled.model.denoiser.get_submodule(plan.name) for plan in plans]
    rows = [quantizer_pairs(layer)[0][0].scale.shape[0] for layer in layers]
    return [plan for plan, count in zip(plans, rows, strict=True) if count > 1]


# every call that runs the network is at the first of three timesteps: rows 1 and 2 are visited by nobody
@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (replaced_row("time_table/rows", 1, 2), "row 1 (timestep 334)"),
        (scaled("time_table/rows", (1, slice(None)), 1.01), "row 1 (timestep 334)"),
        (scaled("step_table/rows", (1, 3), 1.01), "at row 1 (timestep 334)"),
        (scaled("step_table/rows", (2, slice(None)), 8), "at row 2 (timestep 1)"),
    ],
)
def test_a_row_that_no_call_visits_is_named(edit: Edit, expected: str, stepped: Compiled, tmp_path: Path) -> None:
    problems = measured(stepped, edit, tmp_path).problems
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("time", "step", "row", "expected"),
    [
        (True, 334, 2, "row 1 (timestep 334)"),
        (True, 500, 0, "timestep 500 has no row and reads one"),
        (False, 500, 0, "timestep 500 is given row 0, not 1"),
    ],
)
def test_a_wrong_lookup_is_named(
    time: bool, step: int, row: int, expected: str, stepped: Compiled, tmp_path: Path
) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        # a row for every timestep; the time table has one more, for those outside of the range
        lookups = [item for item in proto.graph.initializer if list(item.dims) in ([1000], [1001])]
        name = next(item.name for item in lookups if item.name.startswith("time_table") == time)
        array = constant(proto, name).copy()
        array[step] = row
        set_constant(proto, name, array)

    problems = measured(stepped, edit, tmp_path).problems
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("edit", "module"),
    [
        (operand_scaled("mid_block.resnets.0.norm2/Mul", 1, 1.01), "mid_block.resnets.0.norm2"),
        (
            operand_scaled("down_blocks.0.attentions.0.transformer_blocks.0.attn1/Mul", 1, 1.01),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        ),
        (exchanged_inputs("up_blocks.0/Concat"), "up_blocks.0"),
    ],
)
def test_what_lies_between_quantized_layers_is_named(
    edit: Edit, module: str, static: Compiled, tmp_path: Path
) -> None:
    problems = measured(static, edit, tmp_path).problems
    assert problems
    assert module in problems[0]


def test_exchanged_inputs_in_front_of_a_quantizer_are_named(stepped: Compiled, tmp_path: Path) -> None:
    """What the layer's scale is made of is then the picture, which no table has."""
    changed = []

    def edit(proto: onnx.ModelProto) -> None:
        quantizers = [item for item in proto.graph.node if "mid_block.resnets.0.conv2.input_quantizer/" in item.name]
        node = next(item for item in quantizers if item.op_type in {"Div", "Sub"})
        node.input[0], node.input[1] = node.input[1], node.input[0]
        changed.append(node.name)

    problems = measured(stepped, edit, tmp_path).problems
    assert changed
    assert "mid_block.resnets.0.conv2" in problems[0]


def test_an_epsilon_is_named(static: Compiled, tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        node = next(item for item in proto.graph.node if item.op_type == "LayerNormalization")
        next(item for item in node.attribute if item.name == "epsilon").f = 1.02e-5

    (problem,) = measured(static, edit, tmp_path).problems
    assert "norm1: its epsilon is 1.02e-05, in PyTorch 1e-05" in problem


def test_infinity_in_the_file_is_a_difference(static: Compiled, tmp_path: Path) -> None:
    problems = measured(static, operand_scaled("mid_block.resnets.0.norm2/Mul", 1, np.inf), tmp_path).problems
    assert "-999.0 dB" in problems[0]


def test_a_lookup_of_one_timestep_is_asked_one_at_a_time(stepped: Compiled, tmp_path: Path) -> None:
    """As PyTorch's exporter writes some (GatherND): it gives one row, however many timesteps there are."""

    def edit(proto: onnx.ModelProto) -> None:
        nodes = [item for item in proto.graph.node if item.name.startswith("step_table/") and item.op_type == "Gather"]
        for name, number in (("none", 0), ("one", 1)):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
        first = onnx.helper.make_node("Slice", [nodes[0].input[1], "none", "one", "none"], ["first_row"], "step_rows/S")
        place = list(proto.graph.node).index(nodes[0])
        proto.graph.node.insert(place, first)
        for node in nodes:
            node.input[1] = "first_row"

    found = measured(stepped, edit, tmp_path)
    assert (found.problems, found.rows["timesteps of activation rows"]) == ([], 1000)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A transformer of ten classes, with a row of scales per step and quantizers behind softmax."""
    recipe = recipe_of(
        [{"match": "*", "activation": UNSIGNED}],
        activation_rows="per_step",
        softmax={"bits": 8, "mode": "log2"},
    )
    changes = {"num_embeds_ada_norm": 10, "num_layers": 1}
    loaded = loaded_from_denoiser(random_unet("tiny_dit", **changes), name="tiny")
    plans = plan_model(loaded, recipe)
    rows = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    keys = [key for plan in plans for key in activation_keys(plan)]
    softmax = SoftmaxParameters(bits=8, scale=torch.tensor([1.0, 0.5, 1.0]), mode=torch.ones(3))
    ranges = ActivationRanges(
        low=dict.fromkeys(keys, -3 * rows),
        high=dict.fromkeys(keys, 4 * rows),
        timesteps=(900, 500, 10),
        softmax={"transformer_blocks.0.attn1": softmax},
    )
    model = quantize_model(loaded, plans, recipe, ranges)
    lowered = lower_to_onnx(model, tmp_path_factory.mktemp("classes") / "onnx", target_named("tensorrt-rtx"))
    calls = check_calls(model, lowered.facts.io, 3, seed=0)
    return Compiled(model=model, path=lowered.file.path, io=lowered.facts.io, calls=calls)


def test_every_class_and_every_row_behind_softmax_is_compared(classes: Compiled, tmp_path: Path) -> None:
    found = measured(classes, None, tmp_path, calls=3)
    assert (found.problems, found.notes) == ([], [])
    assert found.rows["classes"] == 11  # and the one for no class
    assert found.rows["rows behind softmax"] == 3


def test_a_class_that_no_call_has_is_named(classes: Compiled, tmp_path: Path) -> None:
    assert not any(7 in call.inputs["class_labels"] for call in classes.calls)

    def edit(proto: onnx.ModelProto) -> None:
        # ten classes, the one for none, and NaN for any other
        tables = [item for item in proto.graph.initializer if len(item.dims) == 2 and item.dims[1] > 1]
        (name,) = [item.name for item in tables if item.dims[0] in (11, 12)]
        array = constant(proto, name).copy()
        array[7, 3] *= np.float32(1.01)
        set_constant(proto, name, array)

    (problem,) = measured(classes, edit, tmp_path).problems
    assert "the embedding of a class differs: class 7" in problem


def test_a_row_behind_softmax_that_no_call_visits_is_named(classes: Compiled, tmp_path: Path) -> None:
    (problem,) = measured(classes, scaled("softmax_table/rows", (1, 0), 1.01), tmp_path).problems
    assert "transformer_blocks.0.attn1.softmax_quantizer at row 1 (timestep 500)" in problem
