"""Edits keep names unique and the network's interface as it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.edit import NodeWriter, add_constant, name_everything, remove_unused, replace_value
from qdexport.graph.evaluate import evaluate

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x) => (float[2] y, float[2] u)
<float[2] c = {1, 2}, float[2] unread = {1, 2}>
{
  ["a/Add"] t = Add(x, c)
  ["b/Relu"] y = Relu(t)
  ["d/Neg"] u = Neg(t)
  ["e/Exp"] dead = Exp(t)
}"""
X = {"x": np.float32([-3, 5])}


def model() -> ir.Model:
    made = ir.from_onnx_text(TEXT)
    for node in made.graph:
        node.metadata_props[LAYER_KEY] = (node.name or "").partition("/")[0]
    return made


def at(made: ir.Model, name: str) -> ir.Node:
    return next(node for node in made.graph if node.name == name)


def checked(made: ir.Model) -> dict[str, np.ndarray]:
    name_everything(made)
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    return evaluate(proto, X)


def test_constants_get_free_names() -> None:
    made = model()
    names = [add_constant(made.graph, "w", np.float32([index])).name for index in range(3)]
    assert names == ["w", "w_1", "w_2"]
    assert add_constant(made.graph, "c", np.int8(3)).name == "c_1"
    assert made.graph.initializers["c_1"].dtype == ir.DataType.INT8
    assert made.graph.initializers["c_1"].shape == ir.Shape([])


def test_a_constant_that_is_a_view_is_stored_in_order() -> None:
    made = model()
    add_constant(made.graph, "w", np.arange(6, dtype=np.float32).reshape(2, 3).T)
    stored = ir.to_proto(made).graph.initializer[-1]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), [[0, 3], [1, 4], [2, 5]])


def test_writing_before_and_after_an_anchor() -> None:
    made = model()
    anchor = at(made, "b/Relu")
    before = NodeWriter(anchor)
    first = before.op("Neg", [anchor.inputs[0]], like=anchor.inputs[0])
    second = before.op("Neg", [first], like=first)
    anchor.replace_input_with(0, second)
    after = NodeWriter(anchor, "other", after=True)
    third = after.op(
        "Mul", [anchor.outputs[0], after.constant("two", np.float32([2]))], like=anchor.outputs[0]
    )
    fourth = after.op("Neg", [third], like=third)
    replace_value(anchor.outputs[0], fourth, keep=[third.producer()])
    assert [node.op_type for node in made.graph] == ["Add", "Neg", "Neg", "Relu", "Mul", "Neg", "Neg", "Exp"]
    outputs = checked(made)
    np.testing.assert_array_equal(outputs["y"], [0, -14])
    assert [node.name for node in made.graph if node.op_type == "Neg"] == [
        "b/Neg",
        "b/Neg_1",
        "other/Neg",
        "d/Neg",
    ]
    assert at(made, "b/Neg").metadata_props[LAYER_KEY] == "b"
    assert at(made, "other/Mul").metadata_props[LAYER_KEY] == "other"
    assert "other/two" in made.graph.initializers


def test_a_cast_to_the_own_type_is_the_value_itself() -> None:
    made = model()
    anchor = at(made, "b/Relu")
    x = made.graph.inputs[0]
    assert NodeWriter(anchor).cast(x, ir.DataType.FLOAT) is x
    half = NodeWriter(anchor).cast(x, ir.DataType.FLOAT16)
    assert half.dtype == ir.DataType.FLOAT16
    assert half.shape == x.shape


def test_replacing_a_graph_output_keeps_its_name() -> None:
    made = model()
    anchor = at(made, "b/Relu")
    new = NodeWriter(anchor, after=True).op("Abs", [anchor.inputs[0]], like=anchor.outputs[0])
    replace_value(anchor.outputs[0], new)
    remove_unused(made)
    assert [value.name for value in made.graph.outputs] == ["y", "u"]
    np.testing.assert_array_equal(checked(made)["y"], [2, 7])


def test_a_graph_output_replaced_by_an_input_or_another_output() -> None:
    """One value cannot have two names, so the output gets a node of its own."""
    made = model()
    replace_value(at(made, "b/Relu").outputs[0], made.graph.inputs[0])
    replace_value(at(made, "d/Neg").outputs[0], made.graph.outputs[0])
    remove_unused(made)
    assert [value.name for value in made.graph.inputs] == ["x"]
    assert [value.name for value in made.graph.outputs] == ["y", "u"]
    outputs = checked(made)
    np.testing.assert_array_equal(outputs["y"], X["x"])
    np.testing.assert_array_equal(outputs["u"], X["x"])


def test_readers_that_keep_the_old_value() -> None:
    made = model()
    relu, neg = at(made, "b/Relu"), at(made, "d/Neg")
    replace_value(relu.inputs[0], made.graph.inputs[0], keep=[neg])
    assert relu.inputs[0] is made.graph.inputs[0]
    assert neg.inputs[0] is at(made, "a/Add").outputs[0]


def test_what_nobody_reads_is_removed() -> None:
    made = model()
    before = dict(made.graph.initializers)
    assert remove_unused(made)
    # freed at once, not at Python's next collection
    assert {name for name, value in before.items() if value.const_value is not None} == {"c"}
    assert [node.op_type for node in made.graph] == ["Add", "Relu", "Neg"]
    assert list(made.graph.initializers) == ["c"]
    assert not remove_unused(made)


def test_values_of_many_merged_layers_have_short_names() -> None:
    """Keys and values of all text are one product: with full names its parts would take a megabyte of SDXL's file."""
    made = model()
    relu = at(made, "b/Relu")
    relu.name = "+".join(f"block.{index}.to_k" for index in range(100)) + "/Split"
    relu.outputs[0].name = None
    name_everything(made)
    assert relu.outputs[0].name == "block.0.to_k+99/Split:0"
    assert relu.name.startswith("block.0.to_k+block.1.to_k+")  # which says what the node stands for


def test_names_are_unique_and_stable() -> None:
    made = model()
    for node in made.graph:
        node.name = "same/Op"
    for node in list(made.graph)[:1]:
        node.outputs[0].name = None
    name_everything(made)
    assert [node.name for node in made.graph] == ["same/Op", "same/Op_1", "same/Op_2", "same/Op_3"]
    assert at(made, "same/Op").outputs[0].name == "same/Op:0"
    first = ir.to_proto(made).SerializeToString(deterministic=True)
    name_everything(made)
    assert ir.to_proto(made).SerializeToString(deterministic=True) == first


def test_a_new_value_never_takes_the_name_of_another() -> None:
    made = model()
    add_constant(made.graph, "a/Add:0", np.float32([1]))
    at(made, "a/Add").outputs[0].name = None
    name_everything(made)
    assert at(made, "a/Add").outputs[0].name == "a/Add:0.1"
