"""Rows of a table: many at once are the rows one by one, and what is constant is computed once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qdexport.graph.evaluate
from qdexport.graph.evaluate import evaluate
from qdexport.graph.rows import evaluate_rows, keeps_rows_apart

VALUES = range(300)  # more than two blocks
# whole numbers, halves and quarters: every sum is exact, in whatever order it is taken
CONSTANTS = {
    "gain": np.float32([[0.5, 1, -2, 4]]),
    "matrix": np.arange(12, dtype=np.float32).reshape(4, 3) - 5,
    "square": np.arange(9, dtype=np.float32).reshape(3, 3) - 4,
    "bias": np.float32([1, -0.5, 2]),
    "tall": np.float32([[1], [2]]),
    "scale": np.float32([0.5]),
    "zero": np.float32([0]),
    "one": np.array([1]),
    "three": np.array([3]),
    "minus1": np.array([-1]),
    "first": np.array([0]),
    "both": np.array([2, 3]),
    "by_row": np.array([-1, 3, 1]),
    "one_row": np.array([1, 3, 1]),
    "columns": np.array([-1, 2]),
}
START = "t1 = Unsqueeze(t, minus1)\n tf = Cast<to: int = 1>(t1)\n x = Mul(tf, gain)\n"
QUANTIZE = "qdexport.FakeQuantize<qmin: int = -8, qmax: int = 7, axis: int = -1>"
APART = [
    ("y = MatMul(x, matrix)", "1,3"),
    ("y = Gemm(x, matrix, bias)", "1,3"),
    ("m = MatMul(x, matrix)\n y = Gemm<transB: int = 1>(m, square, bias)", "1,3"),
    ("y = Concat<axis: int = -1>(x, tf)", "1,5"),
    ("y = Slice(x, one, three, one)", "1,2"),
    ("a, b = Split<axis: int = 1, num_outputs: int = 2>(x)\n y = Sub(b, a)", "1,2"),
    ("m = MatMul(x, matrix)\n y = Reshape(m, by_row)", "1,3,1"),
    ("y = Unsqueeze(x, both)", "1,4,1,1"),
    (f"y = {QUANTIZE}(x, scale, zero)", "1,4"),
    (f"q = {QUANTIZE}(matrix, scale, zero)\n y = MatMul(x, q)", "1,3"),
    ("r = Relu(x)\n n = Neg(r)\n y = Div(n, scale)", "1,4"),
]
MIXED = [
    ("z = Transpose(x)\n y = Mul(z, z)", "4,1"),
    ("y = Concat<axis: int = 0>(x, gain)", "2,4"),
    ("y = MatMul(tall, tf)", "2,1"),
    ("m = MatMul(x, matrix)\n y = Reshape(m, one_row)", "1,3,1"),
    ("y = Reshape(x, columns)", "2,2"),
    ("y = Mul(tf, tall)", "2,1"),
    ("y = ReduceSum<keepdims: int = 1>(x, first)", "1,4"),
    ("y = Unsqueeze(x, first)", "1,1,4"),
    ("s = Slice(x, first, one, first)\n y = Neg(s)", "1,4"),
]


def graph_of(graphs, body: str, shape: str) -> ir.Model:
    return graphs.model_of("int64[1] t", f"float[{shape}] y", START + body, CONSTANTS)


def one_by_one(graphs, body: str, shape: str) -> np.ndarray:
    model = graph_of(graphs, body, shape)
    return np.stack([evaluate(model, {"t": np.array([value])})["y"].ravel() for value in VALUES])


@pytest.mark.parametrize(("body", "shape"), APART)
def test_many_rows_at_once_are_the_rows_one_by_one(graphs, body: str, shape: str) -> None:
    model = graph_of(graphs, body, shape)
    rows = evaluate_rows(model, VALUES)
    assert all(keeps_rows_apart(node) for node in model.graph)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, one_by_one(graphs, body, shape))
    assert len(np.unique(rows, axis=0)) > 1


@pytest.mark.parametrize(("body", "shape"), MIXED)
def test_rows_that_an_operator_mixes_are_computed_one_by_one(graphs, body: str, shape: str) -> None:
    model = graph_of(graphs, body, shape)
    rows = evaluate_rows(model, VALUES)
    assert not all(keeps_rows_apart(node) for node in model.graph)
    np.testing.assert_array_equal(rows, one_by_one(graphs, body, shape))


def test_what_is_constant_is_computed_once(graphs, monkeypatch) -> None:
    """A weight behind its quantizer has the same codes at every timestep."""
    sizes = []
    codes = qdexport.graph.evaluate.fake_quantize_codes

    def counted(x, *rest):
        sizes.append(x.size)
        return codes(x, *rest)

    monkeypatch.setattr(qdexport.graph.evaluate, "fake_quantize_codes", counted)
    body = f"q = {QUANTIZE}(matrix, scale, zero)\n m = MatMul(x, q)\n z = Transpose(m)\n y = Mul(z, z)"
    evaluate_rows(graph_of(graphs, body, "3,1"), VALUES)
    assert sizes == [CONSTANTS["matrix"].size]
