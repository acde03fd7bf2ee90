"""Equal quantizers of one tensor become one; unequal ones stay."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.passes.share_quantizers import ShareQuantizers


def three_readers(graphs, second="x, s2, z2", bounds=(-128, 127)):
    body = "\n".join(
        [
            graphs.quantize("to_q.input_quantizer", "a", "x, s1, z1", -128, 127),
            graphs.quantize("to_k.input_quantizer", "b", second, *bounds),
            graphs.quantize("to_v.input_quantizer", "c", "x, s1, z1", -128, 127),
            '["to_q/Mul"] y1 = Mul(a, two)',
            '["to_k/Mul"] y2 = Mul(b, two)',
            '["to_v/Mul"] y3 = Mul(c, two)',
        ]
    )
    constants = {
        "s1": np.float32([0.25]),
        "z1": np.float32([0]),
        "s2": np.float32([0.25]),
        "z2": np.float32([0]),
        "s3": np.float32([0.5]),
        "z3": np.float32([3]),
        "two": np.float32(2),
    }
    return graphs.model_of(
        "float[2,3] x, float[2,3] u", "float[2,3] y1, float[2,3] y2, float[2,3] y3", body, constants
    )


def feeds(noise):
    return {name: noise.normal(size=(2, 3)).astype(np.float32) for name in ("x", "u")}


def test_equal_numbers_in_different_constants_are_shared(graphs, noise):
    ran = graphs.run(three_readers(graphs), ShareQuantizers(), feeds(noise))
    assert ran.ops == ["FakeQuantize", "Mul", "Mul", "Mul"]
    (kept,) = ran.nodes("FakeQuantize")
    assert kept.name == "to_q.input_quantizer/FakeQuantize"
    assert {use.node.name for use in kept.outputs[0].uses()} == {"to_q/Mul", "to_k/Mul", "to_v/Mul"}
    assert ran.report.touched == ["to_k.input_quantizer", "to_v.input_quantizer"]
    ran.assert_equal()


@pytest.mark.parametrize(
    ("second", "bounds"),
    [
        ("x, s3, z2", (-128, 127)),
        ("x, s2, z3", (-128, 127)),
        ("x, s2, z2", (-8, 7)),
        ("u, s2, z2", (-128, 127)),
    ],
    ids=["scale", "zero point", "range", "input"],
)
def test_a_quantizer_that_differs_stays(graphs, noise, second, bounds):
    ran = graphs.run(three_readers(graphs, second, bounds), ShareQuantizers(), feeds(noise))
    assert ran.ops.count("FakeQuantize") == 2
    assert ran.report.touched == ["to_v.input_quantizer"]
    ran.assert_equal()


def test_chains_are_shared_in_one_run(graphs, noise):
    """Quantizers of quantized tensors become equal only when their inputs have been merged."""
    lines = []
    for out, layer in (("a", "p"), ("b", "q")):
        lines += [
            graphs.quantize(f"{layer}.input_quantizer", out, "x, s, z", -128, 127),
            graphs.quantize(f"{layer}.second.input_quantizer", f"{out}2", f"{out}, s, z", -8, 7),
            f'["{layer}/Mul"] y_{out} = Mul({out}2, two)',
        ]
    constants = {"s": np.float32([0.25]), "z": np.float32([0]), "two": np.float32(2)}
    model = graphs.model_of("float[2,3] x", "float[2,3] y_a, float[2,3] y_b", "\n".join(lines), constants)
    ran = graphs.run(model, ShareQuantizers(), {"x": noise.normal(size=(2, 3)).astype(np.float32)})
    assert ran.ops.count("FakeQuantize") == 2
    ran.assert_equal()


@pytest.mark.parametrize(("second_row", "left"), [("row", 1), ("other_row", 2)])
def test_step_tables_are_shared_when_the_row_is(graphs, noise, second_row, left):
    body = "\n".join(
        [
            graphs.quantize("p.input_quantizer", "a", "x, s, z, row", -128, 127),
            graphs.quantize("q.input_quantizer", "b", f"x, s, z, {second_row}", -128, 127),
            '["p/Mul"] y1 = Mul(a, two)',
            '["q/Mul"] y2 = Mul(b, two)',
        ]
    )
    constants = {"s": np.float32([0.25, 1]), "z": np.float32([0, 2]), "two": np.float32(2)}
    model = graphs.model_of(
        "float[2,3] x, int64[1] row, int64[1] other_row", "float[2,3] y1, float[2,3] y2", body, constants
    )
    x = noise.normal(size=(2, 3)).astype(np.float32)
    ran = graphs.run(model, ShareQuantizers(), {"x": x, "row": np.array([1]), "other_row": np.array([0])})
    assert ran.ops.count("FakeQuantize") == left
    ran.assert_equal()


def test_two_graph_outputs_keep_their_names(graphs, noise):
    body = "\n".join(graphs.quantize(f"{y}.input_quantizer", y, "x, s, z", -128, 127) for y in ("y1", "y2"))
    constants = {"s": np.float32([0.25]), "z": np.float32([0])}
    model = graphs.model_of("float[2,3] x", "float[2,3] y1, float[2,3] y2", body, constants)
    ran = graphs.run(model, ShareQuantizers(), {"x": noise.normal(size=(2, 3)).astype(np.float32)})
    assert ran.ops.count("FakeQuantize") == 1
    ran.assert_equal()
