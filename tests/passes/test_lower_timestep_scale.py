"""Scales chosen by the timestep leave the convolution; codes stay equal in every row."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.core.carrier import carrier_offset
from qdexport.errors import GraphPassError
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.lower_timestep_scale import LowerTimestepScale

STEPS = 2.0 ** -np.array([4, 2, 5], np.float64)  # dyadic: sums are exact in FP32 whatever their order
ROWS = len(STEPS)
SYMMETRIC = ((-128, 127), (0, 0, 0))
FITS = ((0, 15), (3, 0, 15))  # 4 bits: code - zero_point fits INT8 in every row
CENTRED = ((0, 255), (90, 0, 255))  # unsigned 8 bits: offset 128
SIGNED = ((-128, 127), (0, -7, 30))  # signed 8 bits: offset 0
UNSIGNED = ((0, 255), (0, 0, 0))  # the codes alone do not fit


def constants_of(graphs, noise, zeros, weight_shape, *, axis=0, scale=STEPS, bias=True):
    codes = noise.integers(-128, 128, weight_shape)
    channels = weight_shape[axis]
    return {
        "s": np.float32(scale), "z": np.float32(zeros),
        **graphs.weight_constants("w", codes, 2.0 ** noise.integers(-8, -5, channels)),
        **({"b": (noise.integers(-50, 50, channels) * 0.25).astype(np.float32)} if bias else {}),
    }  # fmt: skip


def conv(graphs, noise, quantizer, *, rows="1", pads=1, bias=True, scale=STEPS, group=1):
    bounds, zeros = quantizer
    constants = constants_of(graphs, noise, zeros, (6, 4 // group, 3, 3), scale=scale, bias=bias)
    operands = f"xq, w{', b' if bias else ''}"
    body = "\n".join(
        [
            graphs.quantize("conv.input_quantizer", "xq", "x, s, z, row", *bounds),
            graphs.weight_of("conv", "w"),
            f'["conv/Conv"] y = Conv<group: int = {group}, pads: ints = {[pads] * 4}>({operands})',
        ]
    )
    size = 3 + 2 * pads
    interface = f"float[2,4,5,5] x, int64[{rows}] row", f"float[2,6,{size},{size}] y"
    return graphs.model_of(*interface, body, constants)


def feeds_of(noise, shape=(2, 4, 5, 5), rows=((0,), (1,), (2,)), step=2.0**-6):
    """Values on a grid finer than every scale, half of them ties, for each row."""
    x = (noise.integers(-700, 700, shape) * step).astype(np.float32)
    return [{"x": x, "row": np.array(row, np.int64)} for row in rows]


def check_codes(ran, feeds, quantizer, layer="conv", scale=STEPS):
    """The unit-scale quantizer's output plus its offset is the fake-quant code."""
    (qmin, qmax), zeros = quantizer
    offset = carrier_offset(qmin, qmax, np.float32(zeros))
    for item in feeds:
        shape = [-1] + [1] * (item["x"].ndim - 1)
        s, z = np.float32(scale)[item["row"]].reshape(shape), np.float32(zeros)[item["row"]].reshape(shape)
        expected = fake_quantize_codes(item["x"], s, z, qmin, qmax) - (z if offset is None else offset)
        node = next(
            n.name for n in ran.nodes("FakeQuantize") if n.name.startswith(f"{layer}.input_quantizer/")
        )
        unit = ran.at(node, item)
        if unit.shape != expected.shape:  # padded inside: the border is checked by the layer's output
            unit = unit[..., 1:-1, 1:-1]
        np.testing.assert_array_equal(unit, expected)


@pytest.mark.parametrize("quantizer", [SYMMETRIC, FITS, CENTRED, SIGNED, UNSIGNED])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution(graphs, noise, quantizer, bias):
    feeds = feeds_of(noise)
    ran = graphs.run(conv(graphs, noise, quantizer, bias=bias), LowerTimestepScale(), feeds)
    shifts = {SYMMETRIC: [], FITS: ["Round", "Add", "Clip", "Sub"]}
    shift = shifts.get(quantizer, ["Round", "Add", "Sub"])
    corrected = quantizer not in (SYMMETRIC, FITS)
    assert ran.ops == [
        "Gather", "Split", *(["Pad"] if corrected else []), "Div", *shift, "FakeQuantize",
        "DequantizeLinear", "Conv",
        *(["Mul", "Mul", "Add", "Mul"] if corrected else ["Mul"]), *(["Add"] if bias else []),
    ]  # fmt: skip
    unit = ran.node("conv.input_quantizer/FakeQuantize")
    assert unit.inputs[1].const_value.numpy().tolist() == [1.0]
    assert len(unit.inputs) == 3
    assert ran.node("conv/Conv").inputs[0].producer() is unit
    assert len(ran.node("conv/Conv").inputs) == 2
    assert list(ran.node("conv/Conv").attributes["pads"].as_ints()) == [0 if corrected else 1] * 4
    assert ran.report.touched == ["conv.input_quantizer"]
    check_codes(ran, feeds, quantizer)
    ran.assert_equal()


@pytest.mark.parametrize("quantizer", [SYMMETRIC, FITS, CENTRED, SIGNED])
@pytest.mark.parametrize(
    "rows", [((0, 2), (1, 1), (2, 0)), ((0,), (2,))], ids=["a row per sample", "one row"]
)
def test_a_batch_of_mixed_steps(graphs, noise, quantizer, rows):
    """Row [N] gives every sample its own scale, zero point and correction."""
    feeds = feeds_of(noise, rows=rows)
    ran = graphs.run(conv(graphs, noise, quantizer, rows=str(len(rows[0]))), LowerTimestepScale(), feeds)
    assert ("Reshape" in ran.ops) == (len(rows[0]) == 2)
    check_codes(ran, feeds, quantizer)
    ran.assert_equal()


@pytest.mark.parametrize("quantizer", [SYMMETRIC, CENTRED])
def test_a_batch_of_unknown_size(graphs, noise, quantizer):
    """The number of rows is a symbol: 1 broadcasts, N selects per sample."""
    feeds = feeds_of(noise, rows=((0, 2), (1, 1)))
    ran = graphs.run(conv(graphs, noise, quantizer, rows="N"), LowerTimestepScale(), feeds)
    ran.assert_equal()


def test_one_row_equals_a_static_quantizer(graphs, noise):
    """Equal rows for every step must give what the scale alone gives."""
    quantizer = CENTRED[0], (90,) * ROWS
    feeds = feeds_of(noise)
    ran = graphs.run(conv(graphs, noise, quantizer, scale=[0.25] * ROWS), LowerTimestepScale(), feeds)
    ran.assert_equal()
    first = ran.after[0]["y"]
    assert all((item["y"] == first).all() for item in ran.after)


@pytest.mark.parametrize("quantizer", [SYMMETRIC, CENTRED])
def test_any_scale(graphs, noise, quantizer):
    """Codes are equal for any scale; outputs differ by the order of FP32 sums only."""
    scale = np.array([0.0173, 0.31, 0.00077])
    feeds = feeds_of(noise, step=0.0091)
    ran = graphs.run(conv(graphs, noise, quantizer, pads=0, scale=scale), LowerTimestepScale(), feeds)
    check_codes(ran, feeds, quantizer, scale=scale)
    # 36 products of at most 255 of the largest steps and 128 weight steps of 2^-6; biases below 13
    ran.assert_close(terms=36, magnitude=36 * 255 * 0.31 * 128 * 2.0**-6 + 13)


@pytest.mark.parametrize("quantizer", [FITS, CENTRED])
def test_grouped_convolutions(graphs, noise, quantizer):
    ran = graphs.run(conv(graphs, noise, quantizer, group=2), LowerTimestepScale(), feeds_of(noise))
    ran.assert_equal()


@pytest.mark.parametrize("quantizer", [SYMMETRIC, FITS, CENTRED])
@pytest.mark.parametrize(("rows", "shape"), [("1", "2,5,8"), ("2", "2,5,8"), ("1", "2,8"), ("2", "2,8")])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(graphs, noise, quantizer, rows, shape, bias):
    bounds, zeros = quantizer
    constants = constants_of(graphs, noise, zeros, (8, 3), axis=1)
    lines = [
        graphs.quantize("to_q.input_quantizer", "xq", "x, s, z, row", *bounds),
        graphs.weight_of("to_q", "w", axis=1),
        f'["to_q/MatMul"] {"p" if bias else "y"} = MatMul(xq, w)',
        *(['["to_q/Add"] y = Add(p, b)'] if bias else []),
    ]
    interface = f"float[{shape}] x, int64[{rows}] row", f"float[{shape[:-1]}3] y"
    model = graphs.model_of(*interface, "\n".join(lines), constants)
    feeds = feeds_of(
        noise, tuple(map(int, shape.split(","))), ((0,), (1,), (2,)) if rows == "1" else ((0, 2), (1, 1))
    )
    ran = graphs.run(model, LowerTimestepScale(), feeds)
    check_codes(ran, feeds, quantizer, "to_q")
    ran.assert_equal()


def test_all_quantizers_of_one_row_read_one_table(graphs, noise):
    """Three layers of three kinds: one Gather, columns in graph order."""
    parts = []
    constants = {"r": np.float32(STEPS), "zr": np.float32([0] * ROWS)}
    for layer, quantizer in (("a", SYMMETRIC), ("b", FITS), ("c", CENTRED)):
        names = {"s": f"s{layer}", "z": f"z{layer}"}
        more = constants_of(graphs, noise, quantizer[1], (8, 8), axis=1, bias=False)
        constants |= {names.get(key, key.replace("w_", f"w{layer}_")): value for key, value in more.items()}
        source = {"a": "x", "b": "ya", "c": "yb"}[layer]
        parts += [
            graphs.quantize(
                f"{layer}.input_quantizer", f"q{layer}", f"{source}, s{layer}, z{layer}, row", *quantizer[0]
            ),
            graphs.weight_of(layer, f"w{layer}", axis=1),
            f'["{layer}/MatMul"] y{layer} = MatMul(q{layer}, w{layer})',
        ]
    model = graphs.model_of("float[2,8] x, int64[1] row", "float[2,8] yc", "\n".join(parts), constants)
    feeds = feeds_of(noise, (2, 8))
    ran = graphs.run(model, LowerTimestepScale(), feeds)
    (gather,) = ran.nodes("Gather")
    assert gather.name == "step_table/Gather"
    assert gather.inputs[1].name == "row"
    table = gather.inputs[0].const_value.numpy()
    assert table.shape == (ROWS, 1 + 2 + 3)
    np.testing.assert_array_equal(table[:, 0], STEPS)
    np.testing.assert_array_equal(table[:, 2], FITS[1])
    np.testing.assert_array_equal(table[:, 5], 128 - np.array(CENTRED[1]))
    assert len(ran.nodes("Split")) == 1
    assert ran.report.touched == ["a.input_quantizer", "b.input_quantizer", "c.input_quantizer"]
    ran.assert_equal()


def test_two_convolutions_with_different_pads_share_a_quantizer(graphs, noise):
    bounds, zeros = CENTRED
    weights = {}
    for name in ("w", "v"):
        weights |= graphs.weight_constants(name, noise.integers(-128, 128, (3, 4, 3, 3)), np.full(3, 2.0**-6))
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z, row", *bounds),
            graphs.weight_of("a", "w"),
            graphs.weight_of("b", "v"),
            '["a/Conv"] y1 = Conv<pads: ints = [1,1,1,1]>(xq, w)',
            '["b/Conv"] y2 = Conv<pads: ints = [0,0,1,1], strides: ints = [2,2]>(xq, v)',
        ]
    )
    constants = {"s": np.float32(STEPS), "z": np.float32(zeros), **weights}
    model = graphs.model_of(
        "float[2,4,6,6] x, int64[1] row", "float[2,3,6,6] y1, float[2,3,h,w] y2", body, constants
    )
    ran = graphs.run(model, LowerTimestepScale(), feeds_of(noise, (2, 4, 6, 6)))
    assert ran.ops.count("FakeQuantize") == 2
    assert ran.ops.count("Gather") == 1
    ran.assert_equal()


def test_the_row_lookup_is_left_alone(graphs, noise):
    """``timestep -> Gather`` in the module step_rows; the nearest calibrated step was decided in PyTorch."""
    bounds, zeros = SYMMETRIC
    constants = constants_of(graphs, noise, zeros, (8, 3), axis=1, bias=False)
    constants["row_of_timestep"] = np.repeat(np.arange(ROWS), [300, 300, 400])
    body = "\n".join(
        [
            '["step_rows/Gather"] row = Gather(row_of_timestep, timestep)',
            graphs.quantize("to_q.input_quantizer", "xq", "x, s, z, row", *bounds),
            graphs.weight_of("to_q", "w", axis=1),
            '["to_q/MatMul"] y = MatMul(xq, w)',
        ]
    )
    model = graphs.model_of("float[2,8] x, int64[1] timestep", "float[2,3] y", body, constants)
    x = feeds_of(noise, (2, 8))[0]["x"]
    ran = graphs.run(
        model, LowerTimestepScale(), [{"x": x, "timestep": np.array([t])} for t in (0, 299, 300, 999)]
    )
    assert [node.name for node in ran.nodes("Gather")] == ["step_rows/Gather", "step_table/Gather"]
    ran.assert_equal()


def test_a_half_precision_body(graphs, noise):
    """Small codes and dyadic scales: every number is exact in FP16 too, so outputs must be equal."""
    constants = {
        "s": np.float32([0.25, 0.5]), "z": np.float32([130, 120]), "b": np.float16([1, -2, 0.5]),
        **graphs.weight_constants("w32", noise.integers(-3, 4, (3, 2, 3, 3)), np.float32([0.5, 1, 0.25])),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("conv.input_quantizer", "xq", "x, s, z, row", 0, 255),
            graphs.weight_of("conv", "w32"),
            '["conv.weight_quantizer/Cast"] w = Cast<to: int = 10>(w32)',
            '["conv/Conv"] y = Conv<pads: ints = [1,1,1,1]>(xq, w, b)',
        ]
    )
    model = graphs.model_of("float16[1,2,4,4] x, int64[1] row", "float16[1,3,4,4] y", body, constants)
    x = (noise.integers(-20, 20, (1, 2, 4, 4)) * 0.125).astype(np.float16)
    ran = graphs.run(model, LowerTimestepScale(), [{"x": x, "row": np.array([row])} for row in (0, 1)])
    assert ran.ops[-1] == "Cast"
    assert ran.ops.count("Cast") == 2
    assert str(ran.node("step_table/Gather").outputs[0].dtype) == "FLOAT"
    ran.assert_equal()


def test_static_quantizers_are_left_alone(graphs, noise):
    body = graphs.quantize("a.input_quantizer", "y", "x, s, z", -128, 127)
    constants = {"s": np.float32([0.1]), "z": np.float32([0])}
    model = graphs.model_of("float[2,8] x", "float[2,8] y", body, constants)
    ran = graphs.run(model, LowerTimestepScale(), {"x": feeds_of(noise, (2, 8))[0]["x"]})
    assert not ran.report.changed


def test_another_reader_of_the_codes_is_refused(graphs, noise):
    body = (
        graphs.quantize("a.input_quantizer", "xq", "x, s, z, row", -128, 127) + '\n["act/Relu"] y = Relu(xq)'
    )
    constants = {"s": np.float32(STEPS), "z": np.float32([0] * ROWS)}
    model = graphs.model_of("float[2,8] x, int64[1] row", "float[2,8] y", body, constants)
    with pytest.raises(
        GraphPassError, match=r"'lower-timestep-scale': a\.input_quantizer: act/Relu reads the quantized"
    ):
        graphs.run(model, LowerTimestepScale(), feeds_of(noise, (2, 8)))


def test_a_weight_in_floating_point_is_refused(graphs, noise):
    body = (
        graphs.quantize("a.input_quantizer", "xq", "x, s, z, row", -128, 127)
        + '\n["a/MatMul"] y = MatMul(xq, w)'
    )
    constants = {"s": np.float32(STEPS), "z": np.float32([0] * ROWS), "w": np.ones((8, 3), np.float32)}
    model = graphs.model_of("float[2,8] x, int64[1] row", "float[2,3] y", body, constants)
    with pytest.raises(GraphPassError, match="a: the weight is not quantized although the input is"):
        graphs.run(model, LowerTimestepScale(), feeds_of(noise, (2, 8)))


def test_one_scale_per_channel_is_refused(graphs, noise):
    body = graphs.quantize("a.input_quantizer", "y", "x, s, z, row", -128, 127, axis=1)
    constants = {"s": np.ones((ROWS, 8), np.float32), "z": np.zeros((ROWS, 8), np.float32)}
    model = graphs.model_of("float[2,8] x, int64[1] row", "float[2,8] y", body, constants)
    with pytest.raises(
        GraphPassError, match=r"a.input_quantizer: 8 scales for the channels .* one scale per tensor"
    ):
        graphs.run(model, LowerTimestepScale(), feeds_of(noise, (2, 8)))
