"""Zero points leave static quantizers; codes and, with dyadic scales, every output stay equal bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdexport.core.carrier import carrier_offset
from qdexport.errors import GraphPassError
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.lower_zero_point import LowerZeroPoint

# powers of two, so that every product and sum of these small networks is exact in FP32, whatever its order
STEP = 2.0**-4
# unsigned with z = 128 fits INT8 as it is: a test of its own
WIDE_BITS = [(0, 255, 127), (0, 255, 1), (0, 255, 255), (-128, 127, 37), (-128, 127, -128)]
NARROW = [(bits, zero) for bits in range(2, 8) for zero in (0, 1, (1 << bits) // 2, (1 << bits) - 1)]


def conv(graphs, noise, bounds, *, group=1, pads=(1, 1, 1, 1), bias=True, step=STEP, weight_step=2.0**-6):
    """A quantized convolution of 4 to 6 channels behind an unsigned quantizer."""
    qmin, qmax, zero = bounds
    codes = noise.integers(-128, 128, (6, 4 // group, 3, 3))
    constants = {
        "s": np.float32([step]),
        "z": np.float32([zero]),
        **graphs.weight_constants("w", codes, weight_step * 2.0 ** noise.integers(0, 3, 6)),
        **({"b": (noise.integers(-50, 50, 6) * STEP).astype(np.float32)} if bias else {}),
    }
    operands = f"xq, w{', b' if bias else ''}"
    body = "\n".join(
        [
            graphs.quantize("conv.input_quantizer", "xq", "x, s, z", qmin, qmax),
            graphs.weight_of("conv", "w"),
            f'["conv/Conv"] y = Conv<group: int = {group}, pads: ints = {list(pads)}>({operands})',
        ]
    )
    return graphs.model_of("float[2,4,5,5] x", "float[2,6,h,w] y", body, constants)


def grid(noise, shape=(2, 4, 5, 5), step=STEP, reach=300):
    """Values on and half way between codes, inside and outside the range."""
    return {"x": (noise.integers(-2 * reach, 2 * reach, shape) * (step / 2)).astype(np.float32)}


def codes_of(feeds, bounds, step=STEP):
    qmin, qmax, zero = bounds
    return fake_quantize_codes(feeds["x"], np.float32(step), np.float32(zero), qmin, qmax)


@pytest.mark.parametrize("bounds", WIDE_BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_with_a_padded_border(graphs, noise, bounds, bias):
    feeds = grid(noise)
    ran = graphs.run(conv(graphs, noise, bounds, bias=bias), LowerZeroPoint(), feeds)
    assert ran.ops == [
        "Pad", "Div", "Round", "Add", "Sub", "FakeQuantize", "DequantizeLinear", "Conv", "Add", "Mul",
        *(["Add"] if bias else []),
    ]  # fmt: skip
    unit = ran.node("conv.input_quantizer/FakeQuantize")
    assert [unit.attributes[key].as_int() for key in ("qmin", "qmax", "axis")] == [-128, 127, -1]
    assert all(node.name.startswith("conv.input_quantizer/") for node in list(ran.model.graph)[:6])
    layer = ran.node("conv/Conv")
    assert layer.inputs[0].producer() is unit
    assert layer.inputs[1].producer().op_type == "DequantizeLinear"
    assert len(layer.inputs) == 2
    assert list(layer.attributes["pads"].as_ints()) == [0, 0, 0, 0]
    assert ran.report.touched == ["conv.input_quantizer"]
    ran.assert_equal()
    offset = carrier_offset(bounds[0], bounds[1], np.float32([bounds[2]]))
    border = codes_of({"x": np.zeros(1, np.float32)}, bounds)
    padded = np.pad(codes_of(feeds, bounds), [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=border[0])
    np.testing.assert_array_equal(ran.at(unit.name, feeds) + offset, padded)


def test_the_border_is_where_a_shift_alone_would_be_wrong(graphs, noise):
    """Zeros padded behind the quantizer would read code 128: the test above must be able to fail."""
    feeds = {"x": np.zeros((2, 4, 5, 5), np.float32)}
    ran = graphs.run(conv(graphs, noise, (0, 255, 200)), LowerZeroPoint(), feeds)
    ran.assert_equal()
    assert np.unique(ran.at("conv.input_quantizer/FakeQuantize", feeds)).tolist() == [200 - 128]


@pytest.mark.parametrize("step", [0.0173, 0.3, 3.1e-5])
def test_any_scale(graphs, noise, step):
    """Codes are equal for any scale; outputs differ by the order of FP32 sums only."""
    bounds = (0, 255, 91)
    feeds = {"x": (noise.normal(size=(2, 4, 5, 5)) * 100 * step).astype(np.float32)}
    model = conv(graphs, noise, bounds, pads=(0, 0, 0, 0), step=step, weight_step=0.011)
    ran = graphs.run(model, LowerZeroPoint(), feeds)
    np.testing.assert_array_equal(
        ran.at("conv.input_quantizer/FakeQuantize", feeds) + 128, codes_of(feeds, bounds, step)
    )
    # 36 products, each at most 255 steps times 128 weight steps of at most 4 * 0.011
    ran.assert_close(terms=36, magnitude=36 * 255 * step * 128 * 0.044)


@pytest.mark.parametrize("bounds", [(0, 255, 127), (0, 255, 0), (-128, 127, 5)])
def test_ties_round_to_even_before_the_shift(graphs, noise, bounds):
    """x / s is exactly k + 0.5 everywhere; rounding x / s + z instead would move every code of an odd z."""
    halves = (noise.integers(-200, 200, (2, 4, 5, 5)) + 0.5).astype(np.float32)
    feeds = {"x": halves * np.float32(STEP)}
    ran = graphs.run(conv(graphs, noise, bounds, pads=(0, 0, 0, 0)), LowerZeroPoint(), feeds)
    ran.assert_equal()
    offset = carrier_offset(bounds[0], bounds[1], np.float32([bounds[2]]))
    expected = np.clip(np.rint(halves) + bounds[2], bounds[0], bounds[1])
    np.testing.assert_array_equal(ran.at("conv.input_quantizer/FakeQuantize", feeds) + offset, expected)
    late = np.clip(np.rint(halves + np.float32(bounds[2])), bounds[0], bounds[1])
    assert bounds[2] % 2 == 0 or (late != expected).any()


@pytest.mark.parametrize(("bits", "zero"), NARROW)
def test_narrow_widths_need_other_bounds_only(graphs, noise, bits, zero):
    bounds = (0, (1 << bits) - 1, zero)
    feeds = grid(noise, reach=2 << bits)
    ran = graphs.run(conv(graphs, noise, bounds), LowerZeroPoint(), feeds)
    assert ran.ops == ["FakeQuantize", "DequantizeLinear", "Conv"]
    unit = ran.node("conv.input_quantizer/FakeQuantize")
    assert [unit.attributes[key].as_int() for key in ("qmin", "qmax")] == [-zero, (1 << bits) - 1 - zero]
    assert not ran.node("conv.input_quantizer/FakeQuantize").inputs[2].const_value.numpy().any()
    assert ran.report.changed == (zero != 0)
    assert list(ran.node("conv/Conv").attributes["pads"].as_ints()) == [1, 1, 1, 1]
    ran.assert_equal()


def test_unsigned_codes_around_128_fit(graphs, noise):
    ran = graphs.run(conv(graphs, noise, (0, 255, 128)), LowerZeroPoint(), grid(noise))
    assert ran.ops == ["FakeQuantize", "DequantizeLinear", "Conv"]
    assert ran.report.changed
    ran.assert_equal()


@pytest.mark.parametrize("group", [1, 2])
def test_grouped_convolutions(graphs, noise, group):
    feeds = grid(noise)
    ran = graphs.run(conv(graphs, noise, (0, 255, 77), group=group), LowerZeroPoint(), feeds)
    assert ran.node("conv/Conv").attributes["group"].as_int() == group
    ran.assert_equal()


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (0, 1, 2, 0), (0, 0, 1, 1)])
def test_asymmetric_pads_are_made_explicit_only_where_there_are_any(graphs, noise, pads):
    ran = graphs.run(conv(graphs, noise, (0, 255, 77), pads=pads), LowerZeroPoint(), grid(noise))
    assert ("Pad" in ran.ops) == any(pads)
    ran.assert_equal()


@pytest.mark.parametrize("op", ["Gemm", "Gemm transposed", "MatMul", "MatMul and Add"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(graphs, noise, op, bias):
    transposed = op == "Gemm transposed"
    codes = noise.integers(-128, 128, (3, 8) if transposed else (8, 3))
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]),
        **graphs.weight_constants("w", codes, 2.0 ** noise.integers(-8, -5, 3)),
        "b": (noise.integers(-50, 50, 3) * STEP).astype(np.float32),
    }  # fmt: skip
    shape = "2,8" if op.startswith("Gemm") else "2,5,8"
    lines = [
        graphs.quantize("to_q.input_quantizer", "xq", "x, s, z", 0, 255),
        graphs.weight_of("to_q", "w", axis=0 if transposed else 1),
    ]
    if op.startswith("Gemm"):
        flag = "<transB: int = 1>" if transposed else ""
        lines.append(f'["to_q/Gemm"] y = Gemm{flag}(xq, w{", b" if bias else ""})')
    elif op == "MatMul" or not bias:
        lines.append('["to_q/MatMul"] y = MatMul(xq, w)')
    else:  # the exporter writes a bias first or second
        lines += ['["to_q/MatMul"] p = MatMul(xq, w)', '["to_q/Add"] y = Add(b, p)']
    model = graphs.model_of(f"float[{shape}] x", f"float[{shape[:-1]}3] y", "\n".join(lines), constants)
    feeds = grid(noise, tuple(map(int, shape.split(","))))
    ran = graphs.run(model, LowerZeroPoint(), feeds)
    kind = op.split()[0]
    last = ["Add"] if bias and op != "MatMul" else []
    assert ran.ops == [
        "Div", "Round", "Add", "Sub", "FakeQuantize", "DequantizeLinear", kind, "Add", "Mul", *last,
    ]  # fmt: skip
    assert len(ran.node(f"to_q/{kind}").inputs) == 2
    ran.assert_equal()


def test_a_bias_of_another_module_is_left_alone(graphs, noise):
    """A residual addition after the layer belongs to its parent."""
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]), "r": np.float32([1, 2, 3]),
        **graphs.weight_constants("w", noise.integers(-9, 9, (8, 3)), np.full(3, STEP)),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("a.to_q.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("a.to_q", "w", axis=1),
            '["a.to_q/MatMul"] p = MatMul(xq, w)',
            '["a/Add"] y = Add(p, r)',
        ]
    )
    model = graphs.model_of("float[2,8] x", "float[2,3] y", body, constants)
    ran = graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))
    assert [node.name for node in ran.nodes("Add")][-1] == "a/Add"
    ran.assert_equal()


def two_convs(graphs, noise, second_pads, bounds=(0, 255, 50)):
    """Two convolutions behind one quantizer."""
    weights = {}
    for name in ("w", "v"):
        weights |= graphs.weight_constants(name, noise.integers(-128, 128, (3, 4, 3, 3)), np.full(3, 2.0**-6))
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", *bounds[:2]),
            graphs.weight_of("a", "w"),
            graphs.weight_of("b", "v"),
            '["a/Conv"] y1 = Conv<pads: ints = [1,1,1,1]>(xq, w)',
            f'["b/Conv"] y2 = Conv<pads: ints = {second_pads}, strides: ints = [2,2]>(xq, v)',
        ]
    )
    constants = {"s": np.float32([STEP]), "z": np.float32([bounds[2]]), **weights}
    return graphs.model_of("float[2,4,6,6] x", "float[2,3,6,6] y1, float[2,3,h,w] y2", body, constants)


@pytest.mark.parametrize(
    ("pads", "quantizers", "padded"), [([1, 1, 1, 1], 1, 1), ([0, 0, 0, 0], 2, 1), ([0, 0, 1, 1], 2, 2)]
)
def test_two_convolutions_share_a_quantizer_when_their_pads_agree(graphs, noise, pads, quantizers, padded):
    ran = graphs.run(two_convs(graphs, noise, pads), LowerZeroPoint(), grid(noise, (2, 4, 6, 6)))
    assert ran.ops.count("FakeQuantize") == quantizers
    assert ran.ops.count("Pad") == padded
    assert ran.report.touched == ["a.input_quantizer"]
    ran.assert_equal()


def test_a_rewritten_layer_may_be_an_inner_value_and_a_graph_output(graphs, noise):
    """`graphs.run` has compared the outputs' names; here the output has a reader as well."""
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]), "two": np.float32(2),
        **graphs.weight_constants("w", noise.integers(-9, 9, (8, 3)), np.full(3, STEP)),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("a", "w", axis=1),
            '["a/MatMul"] y = MatMul(xq, w)',
            '["b/Mul"] t = Mul(y, two)',
        ]
    )
    model = graphs.model_of("float[2,8] x", "float[2,3] y, float[2,3] t", body, constants)
    ran = graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))
    ran.assert_equal()


def test_a_half_precision_body_is_left_and_entered_by_casts(graphs, noise):
    """Small codes and dyadic scales: every number is exact in FP16 too, so outputs must be equal."""
    constants = {
        "s": np.float32([0.25]), "z": np.float32([130]), "b": np.float16([1, -2, 0.5]),
        **graphs.weight_constants("w", noise.integers(-3, 4, (3, 2, 3, 3)), np.float32([0.5, 1, 0.25])),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("conv.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("conv", "w32"),
            '["conv.weight_quantizer/Cast"] w = Cast<to: int = 10>(w32)',
            '["conv/Conv"] y = Conv<pads: ints = [1,1,1,1]>(xq, w, b)',
        ]
    )
    constants = {key.replace("w_", "w32_"): value for key, value in constants.items()}
    model = graphs.model_of("float16[1,2,4,4] x", "float16[1,3,4,4] y", body, constants)
    x = (noise.integers(-20, 20, (1, 2, 4, 4)) * 0.125).astype(np.float16)
    ran = graphs.run(model, LowerZeroPoint(), {"x": x})
    assert ran.ops == [
        "Pad", "Cast", "Div", "Round", "Add", "Sub", "FakeQuantize", "DequantizeLinear", "Conv",
        "Add", "Mul", "Add", "Cast",
    ]  # fmt: skip
    assert str(ran.node("conv/Conv").outputs[0].dtype) == "FLOAT"
    assert str(ran.model.graph.outputs[0].dtype) == "FLOAT16"
    ran.assert_equal()


def test_symmetric_signed_quantizers_and_step_tables_are_left_alone(graphs, noise):
    ran = graphs.run(conv(graphs, noise, (-128, 127, 0)), LowerZeroPoint(), grid(noise))
    assert ran.ops == ["FakeQuantize", "DequantizeLinear", "Conv"]
    assert not ran.report.changed
    body = graphs.quantize("a.input_quantizer", "y", "x, s, z, row", 0, 255)
    constants = {"s": np.float32([0.1, 0.2]), "z": np.float32([3, 4])}
    model = graphs.model_of("float[2,8] x, int64[1] row", "float[2,8] y", body, constants)
    table = graphs.run(model, LowerZeroPoint(), {**grid(noise, (2, 8)), "row": np.array([1])})
    assert not table.report.changed


@pytest.mark.parametrize("reader", ["Relu", ""])
def test_another_reader_of_the_codes_is_refused(graphs, noise, reader):
    lines = [graphs.quantize("a.input_quantizer", "xq" if reader else "y", "x, s, z", 0, 255)]
    lines += ['["act/Relu"] y = Relu(xq)'] if reader else []
    constants = {"s": np.float32([STEP]), "z": np.float32([99])}
    model = graphs.model_of("float[2,8] x", "float[2,8] y", "\n".join(lines), constants)
    who = "act/Relu" if reader else "a graph output"
    with pytest.raises(GraphPassError, match=f"a.input_quantizer: {who} reads the quantized tensor itself"):
        graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))


def test_a_weight_in_floating_point_is_refused(graphs, noise):
    body = graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255) + '\n["a/MatMul"] y = MatMul(xq, w)'
    constants = {"s": np.float32([STEP]), "z": np.float32([99]), "w": np.ones((8, 3), np.float32)}
    model = graphs.model_of("float[2,8] x", "float[2,3] y", body, constants)
    with pytest.raises(
        GraphPassError, match="'lower-zero-point': a: the weight is not quantized although the input is"
    ):
        graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))


def test_one_scale_per_channel_is_refused(graphs, noise):
    body = graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255, axis=1) + '\n["a/Relu"] y = Relu(xq)'
    constants = {"s": np.full((1, 8), STEP, np.float32), "z": np.full((1, 8), 3, np.float32)}
    model = graphs.model_of("float[2,8] x", "float[2,8] y", body, constants)
    with pytest.raises(GraphPassError, match=r"a.input_quantizer: .*one scale per tensor"):
        graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))


def test_a_transposed_weight_that_was_not_folded_is_refused(graphs, noise):
    """The sums of its columns would be taken for the sums of its rows."""
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]),
        **graphs.weight_constants("w", noise.integers(-9, 9, (8, 8)), np.full(8, STEP)),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("a", "w"),
            '["a/Transpose"] wt = Transpose<perm: ints = [1,0]>(w)',
            '["a/MatMul"] y = MatMul(xq, wt)',
        ]
    )
    model = graphs.model_of("float[2,8] x", "float[2,8] y", body, constants)
    with pytest.raises(GraphPassError, match=r"a: .*Transpose"):
        graphs.run(model, LowerZeroPoint(), grid(noise, (2, 8)))


@pytest.mark.parametrize("attribute", ["alpha: float = 0.5", "beta: float = 2.0", "transA: int = 1"])
def test_a_scaled_or_transposed_gemm_is_refused(graphs, noise, attribute):
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]), "b": np.ones(8, np.float32),
        **graphs.weight_constants("w", noise.integers(-9, 9, (8, 8)), np.full(8, STEP)),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("a", "w", axis=1),
            f'["a/Gemm"] y = Gemm<{attribute}>(xq, w, b)',
        ]
    )
    model = graphs.model_of("float[8,8] x", "float[8,8] y", body, constants)
    with pytest.raises(GraphPassError, match=f"a: .*{attribute.split(':')[0]}"):
        graphs.run(model, LowerZeroPoint(), grid(noise, (8, 8)))


def test_automatic_padding_is_refused(graphs, noise):
    constants = {
        "s": np.float32([STEP]), "z": np.float32([99]),
        **graphs.weight_constants("w", noise.integers(-9, 9, (3, 4, 3, 3)), np.full(3, STEP)),
    }  # fmt: skip
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", 0, 255),
            graphs.weight_of("a", "w"),
            '["a/Conv"] y = Conv<auto_pad: string = "SAME_UPPER">(xq, w)',
        ]
    )
    model = graphs.model_of("float[2,4,5,5] x", "float[2,3,5,5] y", body, constants)
    with pytest.raises(GraphPassError, match=r"a: .*auto_pad"):
        graphs.run(model, LowerZeroPoint(), grid(noise))


@given(
    x=st.floats(-1e6, 1e6, width=32),
    scale=st.floats(2.0**-20, 2.0**10, width=32),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_the_identity(x, scale, bits, data):
    """``clip(rint(x / s) + z, qmin, qmax) - o == clip(rint(x / s) + z - o, qmin - o, qmax - o)`` is INT8."""
    signed = data.draw(st.booleans())
    qmin = -(1 << (bits - 1)) if signed else 0
    qmax = qmin + (1 << bits) - 1
    zero = np.float32(data.draw(st.integers(qmin, qmax)))
    value, step = np.float32([x]), np.float32([scale])
    offset = carrier_offset(qmin, qmax, np.float32([zero]))
    o = zero if offset is None else np.float32(offset)
    codes = fake_quantize_codes(value, step, zero, qmin, qmax) - o
    moved = np.clip(np.rint(value / step) + zero - o, qmin - o, qmax - o)
    assert codes[0] == moved[0]
    assert -128 <= codes[0] <= 127
    if offset is None:  # the bounds move, and the zero point disappears
        assert (
            codes[0] == fake_quantize_codes(value, step, np.float32(0), int(qmin - zero), int(qmax - zero))[0]
        )
