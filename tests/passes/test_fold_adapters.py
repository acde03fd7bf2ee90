"""A constant expression under a quantizer becomes INT8 codes, equal to those of the fake-quant layer."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.spec import Granularity, LayerPlan, QuantSpec
from qdexport.errors import GraphPassError
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.fold_adapters import FoldAdapters

LINEAR = "to_q.weight_quantizer"


# One input at a time: each output is one weight, which is exact in whatever order BLAS adds it to zeros. It is given
# the weight transposed before the pass, and as it lies behind it.
UNITS = np.eye(8, dtype=np.float32)


def linear(graphs, constants, expression="", *, operand="w", axis=0, bounds=(-128, 127), body="float"):
    """``x -> MatMul`` with a weight ``[out 3, in 8]`` that is quantized, then transposed as torch does."""
    lines = [expression] if expression else []
    lines += [
        graphs.quantize(LINEAR, "wq", f"{operand}, s, z", *bounds, axis=axis),
        '["to_q/Transpose"] wt = Transpose<perm: ints = [1,0]>(wq)',
        '["to_q/MatMul"] y = MatMul(x, wt)',
    ]
    return graphs.model_of(f"{body}[8,8] x", f"{body}[8,3] y", "\n".join(lines), constants)


def constants_of(noise, **more):
    """A weight in units of its scales, with exact ties, zeros and values out of range."""
    scale = np.float32([[0.0071, 0.25, 1.3]])
    steps = np.concatenate([noise.integers(-150, 150, (3, 6)), noise.integers(-150, 150, (3, 2)) + 0.5], axis=1)
    weight = (steps * scale.T.astype(np.float64)).astype(np.float32)
    return {"w": weight, "s": scale, "z": np.zeros((1, 3), np.float32), **more}


def folded(ran, layer="to_q"):
    """Codes, scale and axis of the one DequantizeLinear."""
    (node,) = ran.nodes("DequantizeLinear")
    assert node.name == f"{layer}.weight_quantizer/DequantizeLinear"
    codes, scale, zero = (value.const_value.numpy() for value in node.inputs)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert zero.dtype == np.int8
    assert zero.shape == scale.shape
    assert not zero.any()
    axis = node.attributes.get("axis")
    return codes, scale, None if axis is None else axis.as_int()


def test_a_transposed_linear_weight(graphs, noise):
    constants = constants_of(noise)
    ran = graphs.run(linear(graphs, constants), FoldAdapters(), {"x": UNITS})
    assert ran.ops == ["DequantizeLinear", "MatMul"]
    codes, scale, axis = folded(ran)
    assert axis == 1
    expected = fake_quantize_codes(constants["w"], constants["s"].T, np.float32(0), -128, 127)
    np.testing.assert_array_equal(codes, expected.T)
    np.testing.assert_array_equal(scale, constants["s"][0])
    assert set(ran.model.graph.initializers) == {f"{LINEAR}/codes", f"{LINEAR}/scale", f"{LINEAR}/zero"}
    assert ran.report.touched == [LINEAR]
    ran.assert_equal()


def test_codes_are_those_of_torch(graphs, noise):
    """The fake-quant layer divides in FP32; codes from a product with 1/s would differ at the ties."""
    import torch

    from qdexport.quant.affine import quantize_codes

    constants = constants_of(noise)
    ran = graphs.run(linear(graphs, constants), FoldAdapters(), {"x": UNITS})
    weight, scale = torch.from_numpy(constants["w"]), torch.from_numpy(constants["s"].T.copy())
    expected = quantize_codes(weight, scale, torch.zeros(1), -128, 127)
    np.testing.assert_array_equal(folded(ran)[0].T, expected.numpy())


def test_one_scale_for_the_whole_weight(graphs, noise):
    constants = constants_of(noise) | {"s": np.float32([0.3]), "z": np.float32([0])}
    ran = graphs.run(linear(graphs, constants, axis=-1), FoldAdapters(), {"x": UNITS})
    _, scale, axis = folded(ran)
    assert axis is None
    assert scale.shape == ()
    ran.assert_equal()


def test_a_convolution_weight(graphs, noise):
    constants = {
        "w": noise.normal(size=(6, 2, 3, 3)).astype(np.float32),
        "s": noise.uniform(0.01, 0.03, (1, 6)).astype(np.float32),
        "z": np.zeros((1, 6), np.float32),
    }
    body = graphs.quantize("conv.weight_quantizer", "wq", "w, s, z", -8, 7, axis=0)
    body += '\n["conv/Conv"] y = Conv<group: int = 2, pads: ints = [1,1,1,1]>(x, wq)'
    model = graphs.model_of("float[1,4,5,5] x", "float[1,6,5,5] y", body, constants)
    ran = graphs.run(model, FoldAdapters(), {"x": noise.normal(size=(1, 4, 5, 5)).astype(np.float32)})
    codes, _, axis = folded(ran, "conv")
    assert axis == 0
    assert (codes.min(), codes.max()) == (-8, 7)
    assert ran.node("conv/Conv").inputs[1].producer().op_type == "DequantizeLinear"
    ran.assert_equal()


@pytest.mark.parametrize(
    ("expression", "more"),
    [
        ('["to_q/Slice"] e = Slice(big, starts, ends, axes)', {}),
        ('["to_q/Split"] e, rest = Split<axis: int = 1>(wide, sizes)', {}),
        ('["to_q/MatMul"] ba = MatMul(b, a)\n["to_q/Add"] e = Add(w, ba)', {}),
        ('["to_q/MatMul"] ba = MatMul(b, a)\n["to_q/Add"] wa = Add(w, ba)\n["to_q/Mul"] e = Mul(wa, r)', {}),
    ],
    ids=["slice", "split", "adapter", "adapter and channel scale"],
)
def test_constant_expressions(graphs, noise, expression, more):
    constants = constants_of(noise, **more)
    weight = constants["w"]
    constants |= {
        "big": np.concatenate([weight, weight + 1]), "starts": np.array([0]), "ends": np.array([3]),
        "axes": np.array([0]),
        "wide": np.concatenate([weight, weight], axis=1), "sizes": np.array([8, 8]),
        "b": noise.normal(size=(3, 2)).astype(np.float32), "a": noise.normal(size=(2, 8)).astype(np.float32),
        "r": noise.uniform(0.5, 2, (1, 8)).astype(np.float32),
    }  # fmt: skip
    model = linear(graphs, constants, expression, operand="e")
    ran = graphs.run(model, FoldAdapters(), {"x": UNITS})
    assert ran.ops == ["DequantizeLinear", "MatMul"]
    assert len(ran.model.graph.initializers) == 3
    ran.assert_equal()


def test_two_parts_of_one_weight(graphs, noise):
    """The split convolution of concat(hidden, skip): one Split feeds two quantizers."""
    constants = {
        "w": noise.normal(size=(3, 8)).astype(np.float32), "sizes": np.array([5, 3]),
        "s": np.float32([[0.01, 0.02, 0.03]]), "t": np.float32([[0.03, 0.01, 0.02]]),
        "z": np.zeros((1, 3), np.float32),
    }  # fmt: skip
    body = "\n".join(
        [
            '["c/Split"] w0, w1 = Split<axis: int = 1>(w, sizes)',
            graphs.quantize("c.weight_quantizers.0", "q0", "w0, s, z", -128, 127, axis=0),
            graphs.quantize("c.weight_quantizers.1", "q1", "w1, t, z", -128, 127, axis=0),
            '["c#0/Gemm"] y0 = Gemm<transB: int = 1>(x0, q0)',
            '["c#1/Gemm"] y1 = Gemm<transB: int = 1>(x1, q1)',
            '["c/Add"] y = Add(y0, y1)',
        ]
    )
    model = graphs.model_of("float[2,5] x0, float[2,3] x1", "float[2,3] y", body, constants)
    feeds = {name: noise.normal(size=(2, width)).astype(np.float32) for name, width in (("x0", 5), ("x1", 3))}
    ran = graphs.run(model, FoldAdapters(), feeds)
    assert ran.ops == ["DequantizeLinear", "DequantizeLinear", "Gemm", "Gemm", "Add"]
    assert ran.report.touched == ["c.weight_quantizers.0", "c.weight_quantizers.1"]
    ran.assert_equal()


def test_a_weight_that_others_read_stays_for_them(graphs, noise):
    constants = constants_of(noise)
    lines = [
        graphs.quantize(LINEAR, "wq", "w, s, z", -128, 127, axis=0),
        '["to_q/Gemm"] y = Gemm<transB: int = 1>(x, wq)',
        '["other/Gemm"] u = Gemm<transB: int = 1>(x, w)',
    ]
    model = graphs.model_of("float[8,8] x", "float[8,3] y, float[8,3] u", "\n".join(lines), constants)
    ran = graphs.run(model, FoldAdapters(), {"x": UNITS})
    assert "w" in ran.model.graph.initializers
    ran.assert_equal()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_narrow_body_gets_a_cast(graphs, noise, dtype):
    """Codes come from FP32 divisions of the narrow weight, as in the fake-quant layer."""
    constants = constants_of(noise)
    constants["w"] = constants["w"].astype(dtype)
    number, name = (10, "float16") if dtype is np.float16 else (16, "bfloat16")
    model = linear(graphs, constants, body=name)
    ran = graphs.run(model, FoldAdapters(), {"x": UNITS.astype(dtype)})
    assert ran.ops == ["DequantizeLinear", "Cast", "MatMul"]
    assert ran.nodes("Cast")[0].attributes["to"].as_int() == number
    expected = fake_quantize_codes(constants["w"].astype(np.float32), constants["s"].T, np.float32(0), -128, 127)
    np.testing.assert_array_equal(folded(ran)[0].T, expected)
    ran.assert_equal()


def test_activations_are_left_alone(graphs, noise):
    body = graphs.quantize("a.input_quantizer", "y", "x, s, z", -128, 127)
    constants = {"s": np.float32([0.1]), "z": np.float32([0])}
    model = graphs.model_of("float[8,8] x", "float[8,8] y", body, constants)
    ran = graphs.run(model, FoldAdapters(), {"x": UNITS})
    assert ran.ops == ["FakeQuantize"]
    assert not ran.report.changed


@pytest.mark.parametrize(("zero", "bounds"), [(3, (0, 127)), (-5, (-64, 63)), (7, (0, 15))])
def test_foreign_zero_points_that_fit(graphs, noise, zero, bounds):
    """Widths up to 7 keep ``code - zero_point`` in INT8."""
    constants = constants_of(noise) | {"z": np.full((1, 3), zero, np.float32)}
    ran = graphs.run(
        linear(graphs, constants, bounds=bounds),
        FoldAdapters(),
        {"x": UNITS},
    )
    codes, _, _ = folded(ran)
    assert codes.min() >= bounds[0] - zero
    assert codes.max() <= bounds[1] - zero
    ran.assert_equal()


def test_codes_that_int8_cannot_hold_are_refused(graphs, noise):
    constants = constants_of(noise) | {"z": np.full((1, 3), 3, np.float32)}
    model = linear(graphs, constants, bounds=(0, 255))
    with pytest.raises(GraphPassError, match=r"to_q.weight_quantizer: code - zero_point reaches -3\.\.\d+, which INT8"):
        graphs.run(model, FoldAdapters(), {"x": UNITS})


def test_a_weight_with_step_rows_is_refused(graphs, noise):
    constants = constants_of(noise)
    constants["s"] = np.concatenate([constants["s"]] * 2)
    constants["z"] = np.zeros((2, 3), np.float32)
    with pytest.raises(GraphPassError, match=r"to_q\.weight_quantizer: a weight has one row of scales, not 2"):
        graphs.run(linear(graphs, constants), FoldAdapters(), {"x": UNITS})


def test_a_scale_that_is_computed_is_refused(graphs, noise):
    body = graphs.quantize(LINEAR, "wq", "w, s, z", -128, 127, axis=0)
    body += '\n["to_q/Gemm"] y = Gemm<transB: int = 1>(x, wq)'
    constants = constants_of(noise)
    del constants["s"]
    model = graphs.model_of("float[8,8] x, float[1,3] s", "float[8,3] y", body, constants)
    with pytest.raises(GraphPassError, match=r"weight_quantizer/FakeQuantize .*input 1, s, is not constant"):
        graphs.run(model, FoldAdapters(), {"x": UNITS, "s": np.ones((1, 3), np.float32)})


@pytest.mark.parametrize("reduced", [False, True], ids=["plain", "reparameterized"])
def test_a_cast_before_the_transpose(graphs, noise, reduced):
    """A channel scale makes the weight FP32, so that an FP16 body casts it behind its quantizer."""
    constants = constants_of(noise)
    lines = [
        graphs.quantize(LINEAR, "wq", "w, s, z", -128, 127, axis=0),
        f'["{LINEAR}/Cast"] wn = Cast<to: int = 10>(wq)',
        '["to_q/Transpose"] wt = Transpose<perm: ints = [1,0]>(wn)' if not reduced else "",
        f'["to_q/{"Gemm" if reduced else "MatMul"}"] y = '
        + ("Gemm<transB: int = 1>(x, wn)" if reduced else "MatMul(x, wt)"),
    ]
    model = graphs.model_of("float16[8,8] x", "float16[8,3] y", "\n".join(lines), constants)
    ran = graphs.run(model, FoldAdapters(), {"x": UNITS.astype(np.float16)})
    assert ran.ops == ["DequantizeLinear", "Cast", "Gemm" if reduced else "MatMul"]
    _, _, axis = folded(ran)
    assert axis == (0 if reduced else 1)
    ran.assert_equal()


def int4_context(graphs, *, bits=4, kind="linear", int4=True, granularity=Granularity.PER_CHANNEL):
    weight = QuantSpec(bits=bits, granularity=granularity)
    layer = LayerPlan(name="to_q", kind=kind, weight=weight, activation=QuantSpec(bits=8))
    return dataclasses.replace(graphs.context_of(), layers=(layer,), int4=int4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_narrow_linear_weights_are_stored_as_int4(graphs, noise, bits, dtype):
    constants = constants_of(noise)
    constants["w"] = constants["w"].astype(dtype)
    bounds = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    model = linear(graphs, constants, bounds=bounds, body="float" if dtype is np.float32 else "float16")
    ran = graphs.run(
        model, FoldAdapters(), {"x": UNITS.astype(dtype)}, int4_context(graphs, bits=bits)
    )
    (node,) = ran.nodes("DequantizeLinear")
    assert [value.dtype for value in node.inputs] == [ir.DataType.INT4, ir.DataType.FLOAT, ir.DataType.INT4]
    codes, _, zero = (value.const_value for value in node.inputs)
    assert (codes.nbytes, len(ir.serde.serialize_tensor(codes).raw_data)) == (12, 12)
    assert zero.shape == (3,)
    expected = fake_quantize_codes(constants["w"].astype(np.float32), constants["s"].T, np.float32(0), *bounds)
    np.testing.assert_array_equal(codes.numpy().astype(np.int8), expected.T)
    assert not ran.report.skipped
    ran.assert_equal()


@pytest.mark.parametrize(
    "changes",
    [{"bits": 5}, {"kind": "conv"}, {"int4": False}, {"granularity": Granularity.PER_TENSOR}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_weights_stay_int8(graphs, noise, changes):
    ran = graphs.run(
        linear(graphs, constants_of(noise), bounds=(-8, 7)),
        FoldAdapters(),
        {"x": UNITS},
        int4_context(graphs, **changes),
    )
    folded(ran)
    assert not ran.report.skipped
    ran.assert_equal()


def test_an_odd_number_of_codes_stays_int8(graphs, noise):
    """onnx-tensorrt refuses it: "4-bit quantization requies an even number of elements"."""
    constants = constants_of(noise)
    constants["w"] = constants["w"][:, :7].copy()
    lines = [
        graphs.quantize(LINEAR, "wq", "w, s, z", -8, 7, axis=0),
        '["to_q/Gemm"] y = Gemm<transB: int = 1>(x, wq)',
    ]
    model = graphs.model_of("float[7,7] x", "float[7,3] y", "\n".join(lines), constants)
    feeds = {"x": UNITS[:7, :7]}
    ran = graphs.run(model, FoldAdapters(), feeds, int4_context(graphs))
    folded(ran)
    (skipped,) = ran.report.skipped
    assert skipped.node == f"{LINEAR}/FakeQuantize"
    assert "21 weights are an odd number" in skipped.reason
    ran.assert_equal()


def test_codes_that_int4_cannot_hold_are_refused(graphs, noise):
    constants = constants_of(noise) | {"z": np.full((1, 3), 3, np.float32)}
    model = linear(graphs, constants, bounds=(0, 15))
    with pytest.raises(GraphPassError, match=r"to_q.weight_quantizer: .* reaches -3\.\.12, which INT4 cannot hold"):
        graphs.run(model, FoldAdapters(), {"x": UNITS}, int4_context(graphs))
