"""What is added to a convolution is added before it is rounded to FP16; images in FP16, and other casts, stay."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.passes.sink_cast import SinkCast

CONV = """
    ["conv/Conv"] c = Conv<pads = [1, 1, 1, 1]>(x, w)
    ["conv/Mul"] m = Mul(c, s)
    ["conv/Add"] a = Add(m, b)
    ["conv/Cast"] h = Cast<to = 10>(a)
"""


def network(graphs, noise, addition, *, second="float16[2, 3, 1, 1] row", extra=None):
    constants = {
        "w": noise.standard_normal((3, 2, 3, 3)).astype(np.float32),
        "s": np.float32([0.37]).reshape(1, 1, 1, 1),
        "b": noise.standard_normal((3, 1, 1)).astype(np.float32),
        **(extra or {}),
    }
    return graphs.model_of(f"float[2, 2, 6, 6] x, {second}", "float16[2, 3, 6, 6] y", CONV + addition, constants)


def feeds(noise, spatial=1):
    return {
        "x": noise.standard_normal((2, 2, 6, 6)).astype(np.float32),
        "row": noise.standard_normal((2, 3, spatial, spatial)).astype(np.float16),
    }


@pytest.mark.parametrize("operands", ["h, row", "row, h"])
def test_the_sum_is_rounded_once(graphs, noise, operands):
    inputs = feeds(noise)
    ran = graphs.run(network(graphs, noise, f'["block/Add"] y = Add({operands})'), SinkCast(), inputs)
    assert ran.report.touched == ["conv"]
    assert ran.ops == ["Conv", "Mul", "Add", "Cast", "Add", "Cast"]
    wide = ran.before_at("conv/Add", inputs)  # FP32
    once = (wide + inputs["row"].astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(ran.after[0]["y"], once)
    twice = wide.astype(np.float16) + inputs["row"]
    np.testing.assert_array_equal(ran.before[0]["y"], twice)
    assert (once != twice).any()  # else the test shows nothing


def test_the_layer_still_ends_in_front_of_the_row(graphs, noise):
    """Parity compares what stands under the layer's name."""
    ran = graphs.run(network(graphs, noise, '["block/Add"] y = Add(h, row)'), SinkCast(), feeds(noise))
    assert [node.name.rpartition("/")[0] for node in ran.model.graph] == ["conv"] * 3 + ["block"] * 3


SHORTCUT = """
    ["shortcut/Conv"] c2 = Conv<pads = [1, 1, 1, 1]>(x, v)
    ["shortcut/Mul"] m2 = Mul(c2, s)
    ["shortcut/Cast"] h2 = Cast<to = 10>(m2)
"""


@pytest.mark.parametrize("operands", ["h, h2", "h2, h"])
def test_two_convolutions_and_a_row_are_rounded_once(graphs, noise, operands):
    """A residual block whose shortcut is convolved: both casts become one, below the last addition."""
    inputs = feeds(noise)
    addition = f'{SHORTCUT}["block/Add"] sum = Add({operands})\n["block/Add_1"] y = Add(sum, row)'
    model = network(graphs, noise, addition, extra={"v": noise.standard_normal((3, 2, 3, 3)).astype(np.float32)})
    ran = graphs.run(model, SinkCast(), inputs)
    assert ran.ops.count("Cast") == 2  # the row's, and the last
    first, second = ran.before_at("conv/Add", inputs), ran.before_at("shortcut/Mul", inputs)
    expected = (first + second + inputs["row"].astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(ran.after[0]["y"], expected)
    assert (ran.before[0]["y"] != expected).any()


def test_an_image_is_added_in_fp16(graphs, noise):
    """A residual in FP32 would be read at twice the bytes."""
    model = network(graphs, noise, '["block/Add"] y = Add(h, row)', second="float16[2, 3, 6, 6] row")
    ran = graphs.run(model, SinkCast(), feeds(noise, spatial=6))
    assert "an image" in ran.report.skipped[0].reason
    ran.assert_equal()


@pytest.mark.parametrize(
    "addition",
    [
        '["block/Mul"] y = Mul(h, row)',
        '["block/Add"] r = Add(h, row)\n["block/Add_1"] y = Add(r, h)',
    ],
    ids=["a product", "read twice"],
)
def test_what_else_reads_the_layer_keeps_its_cast(graphs, noise, addition):
    ran = graphs.run(network(graphs, noise, addition), SinkCast(), feeds(noise))
    assert ran.report.touched == []
    ran.assert_equal()


def test_a_cast_behind_no_convolution_stays(graphs, noise):
    body = '["act/Relu"] a = Relu(x)\n["act/Cast"] h = Cast<to = 10>(a)\n["block/Add"] y = Add(h, row)'
    model = graphs.model_of(
        "float[2, 2, 6, 6] x, float16[2, 2, 1, 1] row",
        "float16[2, 2, 6, 6] y",
        body,
        {},
    )
    row = noise.standard_normal((2, 2, 1, 1)).astype(np.float16)
    ran = graphs.run(model, SinkCast(), {**feeds(noise), "row": row})
    assert ran.report.touched == []
    ran.assert_equal()
