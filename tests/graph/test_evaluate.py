"""The numpy oracle itself, against the formula and against PyTorch, code by code."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdexport.graph.evaluate import evaluate, fake_quantize_codes, subgraph

HEADER = '<ir_version: 10, opset_import: ["" : 21, "qdexport" : 1]>\n'


def quantizer(kind: str, constants: str, operands: str, attributes: tuple[int, int, int]) -> ir.Model:
    qmin, qmax, axis = attributes
    extra = ", int64[N] row" if "row" in operands else ""
    return ir.from_onnx_text(
        f"{HEADER} g ({kind}[2,3,4] x{extra}) => ({kind}[2,3,4] y) <{constants}> "
        f"{{ y = qdexport.FakeQuantize<qmin: int = {qmin}, qmax: int = {qmax}, axis: int = {axis}>"
        f"({operands}) }}"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_per_tensor(noise: np.random.Generator, dtype: type) -> None:
    kind = "float" if dtype is np.float32 else "float16"
    model = quantizer(kind, "float[1] s = {0.1}, float[1] z = {3}", "x, s, z", (0, 15, -1))
    x = noise.normal(size=(2, 3, 4)).astype(dtype)
    y = evaluate(model, {"x": x})["y"]
    scale = np.float32(0.1)
    codes = np.clip(np.rint(x.astype(np.float32) / scale) + 3, 0, 15)
    np.testing.assert_array_equal(y, ((codes - 3) * scale).astype(dtype), strict=True)


@pytest.mark.parametrize(("axis", "count"), [(0, 2), (1, 3), (2, 4)])
def test_per_channel(noise: np.random.Generator, axis: int, count: int) -> None:
    scales = noise.uniform(0.05, 0.3, count).astype(np.float32)
    text = ", ".join(f"{value:.9g}" for value in scales)
    zeros = ", ".join("0" * count)
    constants = f"float[1,{count}] s = {{{text}}}, float[1,{count}] z = {{{zeros}}}"
    x = noise.normal(size=(2, 3, 4)).astype(np.float32)
    y = evaluate(quantizer("float", constants, "x, s, z", (-8, 7, axis)), {"x": x})["y"]
    for index in range(count):
        part = np.take(x, index, axis)
        expected = np.clip(np.rint(part / scales[index]), -8, 7) * scales[index]
        np.testing.assert_array_equal(np.take(y, index, axis), expected)


@pytest.mark.parametrize("rows", [[1], [2, 0], [1, 1]])
def test_rows_select_per_call_or_per_sample(noise: np.random.Generator, rows: list[int]) -> None:
    constants = "float[3] s = {0.1, 0.2, 0.4}, float[3] z = {0, 1, 2}"
    model = quantizer("float", constants, "x, s, z, row", (-8, 7, -1))
    x = noise.normal(size=(2, 3, 4)).astype(np.float32)
    y = evaluate(model, {"x": x, "row": np.array(rows)})["y"]
    scale, zero = np.float32([0.1, 0.2, 0.4]), np.float32([0, 1, 2])
    for sample in range(2):
        row = rows[sample % len(rows)]
        codes = np.clip(np.rint(x[sample] / scale[row]) + zero[row], -8, 7)
        np.testing.assert_array_equal(y[sample], (codes - zero[row]) * scale[row])


def test_halves_round_to_even() -> None:
    codes = fake_quantize_codes(
        np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]), np.float32(1), np.float32(1), -128, 127
    )
    np.testing.assert_array_equal(codes, [-1, -1, 1, 1, 3, 3])


@given(
    x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    scale=st.floats(2.0**-126, 2.0**60, width=32),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_codes_are_those_of_torch(x: list[float], scale: float, bits: int, data: st.DataObject) -> None:
    """The same FP32 division and rounding on both sides: equal for every input, overflow included."""
    import torch

    from qdexport.quant.affine import quantize_codes

    qmin = data.draw(st.sampled_from([0, -(1 << (bits - 1))]))
    qmax = qmin + (1 << bits) - 1
    zero = data.draw(st.integers(qmin, qmax))
    array = np.float32(x)
    with np.errstate(over="ignore"):
        ours = fake_quantize_codes(array, np.float32(scale), np.float32(zero), qmin, qmax)
    theirs = quantize_codes(
        torch.from_numpy(array), torch.tensor(scale), torch.tensor(float(zero)), qmin, qmax
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_input_is_not_changed(noise: np.random.Generator) -> None:
    x = noise.normal(size=5).astype(np.float32)
    copy = x.copy()
    fake_quantize_codes(x, np.float32(0.1), np.float32(0), -8, 7)
    np.testing.assert_array_equal(x, copy)


def test_a_subgraph_is_a_copy() -> None:
    model = ir.from_onnx_text(
        HEADER + "g (float[2] x, float[2] u) => (float[2] y) <float[2] c = {1, 2}> "
        "{ t = Add(x, c)\n v = Mul(t, t)\n y = Add(v, u) }"
    )
    value = next(node for node in model.graph if node.op_type == "Mul").outputs[0]
    part = subgraph(model, [model.graph.inputs[0]], [value])
    assert [node.op_type for node in part.graph] == ["Add", "Mul"]
    np.testing.assert_array_equal(evaluate(part, {"x": np.float32([1, 1])})["v"], [4, 9])
    part.graph.initializers["c"].const_value = ir.tensor(np.float32([0, 0]), name="c")
    np.testing.assert_array_equal(
        evaluate(model, {"x": np.float32([1, 1]), "u": np.float32([0, 0])})["y"], [4, 9]
    )
