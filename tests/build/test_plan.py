"""The log's kernel section: how it is read, and what real plans say about known patterns."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from qdexport.build.plan import (
    PlanTensor,
    engine_coverage,
    kernel_counts,
    module_of,
    parse_plan,
    plan_tensors,
)
from qdexport.errors import BuildError

ROW = "Strides: [64,1], StrideOrder: [1,0], Datatype: {dtype}, Format: (Linear) Row major linear format"


def tensor(name, dims, dtype):
    return f"{{ Name: {name}, Dimensions: [{dims}], {ROW.format(dtype=dtype)} }}"


def line(name, kind, inputs=(), constants=(), outputs=(), nodes=()):
    """One line as TensorRT-RTX 1.7 writes it; tensors are (name, dims, dtype)."""

    def listed(tensors):
        return "[" + (" " + ", ".join(tensor(*item) for item in tensors) if tensors else "") + "]"

    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {listed(inputs)}, Constants: {listed(constants)}, "
        f"Outputs: {listed(outputs)}, TacticName: {name}_0x12, StreamId: 0, Metadata: {metadata}"
    )


def plan_of(*lines):
    return parse_plan("\n".join(["INFO: before", "VERBOSE: Layers:", *lines, "", "I/O Tensors:"]), "tensorrt-rtx")


QKV = line(
    "to_v/MatMul+to_k/MatMul+to_q/MatMul_myl0_1",
    "gemm",
    [("x_myl0", "128,64", "Int8")],
    [("w_dconst", "64,192", "Int8"), ("alpha", "1", "Float"), ("beta", "1", "Float")],
    [("y", "128,192", "Float")],
    ["to_v/MatMul", "to_k/MatMul", "to_q/MatMul", "to_q.input_quantizer/DequantizeLinear"],
)


def test_a_computed_bias_is_no_factor():
    """A zero point per step makes the bias of a convolution a computed tensor, which stands before the constants."""
    conv = line(
        "conv/Conv_myl0_1",
        "correlation",
        [("x", "2,32,18,18", "Int8"), ("shift", "1,32,1,1", "Float")],
        [("s", "1,32,1,1", "Float"), ("w", "32,32,3,3", "Int8"), ("t", "1,32,1,1", "Float")],
        [("y", "2,32,16,16", "Float")],
        ["conv/Conv"],
    )
    plan = plan_of(conv)
    assert engine_coverage(plan, ["conv"]) == {"conv": "int8"}
    assert kernel_counts(plan).int8_compute == 1
    half = plan_of(conv.replace("Int8", "Half"))
    assert engine_coverage(half, ["conv"]) == {"conv": "fp16"}
    assert kernel_counts(half).fp_compute == 1


def test_a_line_is_read_completely():
    (kernel,) = plan_of(QKV).kernels
    assert (kernel.index, kernel.kind, kernel.tactic) == (0, "gemm", f"{kernel.name}_0x12")
    assert kernel.inputs == [
        "int8[128,64] x_myl0",
        "const int8[64,192] w_dconst",
        "const fp32[1] alpha",
        "const fp32[1] beta",
    ]
    assert kernel.outputs == ["fp32[128,192] y"]
    assert kernel.nodes == [
        "to_v/MatMul",
        "to_k/MatMul",
        "to_q/MatMul",
        "to_q.input_quantizer/DequantizeLinear",
    ]
    assert kernel.modules == ["to_v", "to_k", "to_q", "to_q.input_quantizer"]


def test_a_merged_kernel_counts_once_and_covers_each_layer():
    plan = plan_of(QKV)
    assert kernel_counts(plan).int8_compute == 1
    assert engine_coverage(plan, ["to_q", "to_k", "to_v", "to"]) == {
        "to_q": "int8",
        "to_k": "int8",
        "to_v": "int8",
        "to": "missing",
    }


def test_a_product_that_was_merged_before_the_builder_covers_each_layer():
    plan = plan_of(QKV.replace("to_v/MatMul", "b.to_k+b.to_v/MatMul"))
    assert engine_coverage(plan, ["b.to_k", "b.to_v"]) == {"b.to_k": "int8", "b.to_v": "int8"}
    assert plan.kernels[0].modules[:2] == ["b.to_k", "b.to_v"]


def test_tensors_can_be_parsed_back():
    for item in (
        PlanTensor(name="a b", dtype="int8", dims=(-1, 3), constant=True),
        PlanTensor(name="x] [1]", dtype="fp16", dims=(), constant=False),
    ):
        assert PlanTensor.parse(str(item)) == item


def test_signals_and_waits_are_no_kernels():
    plan = plan_of(line("s", "signal"), QKV, line("w", "wait"))
    counts = kernel_counts(plan)
    assert (len(plan.kernels), counts.kernels, counts.by_type) == (3, 1, {"gemm": 1})


def test_a_fused_kernel_that_dequantizes_computes_in_floating_point():
    def fused(name):
        return line(
            name,
            "runtime_fusion",
            [("x", "128,64", "Int8")],
            [("s", "64,1", "Float"), ("w", "64,48", "Int8")],
            [("y", "128,48", "Half")],
            ["l/MatMul"],
        )

    assert engine_coverage(plan_of(fused("__myl_CastMulCastCastMulCastFc_myl0_1")), ["l"]) == {"l": "fp16"}
    assert engine_coverage(plan_of(fused("__myl_FcMulAdd_myl0_1")), ["l"]) == {"l": "int8"}


def test_the_worst_of_several_kernels_counts():
    half = QKV.replace("Int8", "Half")
    assert engine_coverage(plan_of(QKV, half, QKV), ["to_q"]) == {"to_q": "fp16"}


def test_an_unknown_type_is_not_taken_for_a_good_one():
    assert engine_coverage(plan_of(QKV, QKV.replace("Int8", "Int2")), ["to_q"]) == {"to_q": "int2"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("__myl_CastMulMinMaxRounCast_myl0_0", 1),
        ("__myl_MulMinMaxRounCastResh_myl0_0", 1),
        # these end a convolution, a normalization or an attention and quantize on the way
        ("__myl_MulCastCastMulMinMaxRounCast_myl0_4", 0),
        ("__myl_SiluCastMulMinMaxRounCastGnor_myl0_7", 0),
        ("_gemm_mha_v2_myl0_5", 0),
    ],
)
def test_kernels_that_only_quantize(name, found):
    text = line(name, "kgen", [("x", "4,4", "Half")], [("s", "1", "Float")], [("q", "4,4", "Int8")])
    assert kernel_counts(plan_of(text)).quantize_only == found


def test_the_lines_of_tensorrt_10():
    def tensor_of(name, dims, dtype):
        return f"{{ Name: {name}, Location: Device, Dimensions: [{dims}], Format/Datatype: {dtype} }}"

    operands = [("x", "1,4096", "Int8"), ("__mye595_dconst", "4096,1000", "Int8"), ("a", "1", "Float")]
    gemm = (
        "Name: fc/Gemm_myl9_4, LayerType: gemm, "
        f"Inputs: [ {', '.join(tensor_of(*item).replace('Location: Device, ', '') for item in operands)}], "
        f"Outputs: [ {tensor_of('y', '1,1000', 'Half')}], "
        "TacticName: sm80, StreamId: 0, Metadata: [ONNX Layer: fc/Gemm][ONNX Layer: fc/Add]"
    )
    conv = (
        "Name: c/Conv, LayerType: CaskConvolution, "
        f"Inputs: [ {tensor_of('x', '1,3,8,8', 'Row major linear FP16 format')}], "
        f"Outputs: [ {tensor_of('y', '1,8,8,8', 'Row major linear FP16 format')}], "
        'ParameterType: Convolution, Weights: {"Type": "Half", "Count": 216}, TacticName: sm80, '
        "TacticValue: 0x28, StreamId: 0, Metadata: [ONNX Layer: c/Conv]"
    )
    plan = plan_of(gemm, conv)
    assert engine_coverage(plan, ["fc", "c"]) == {"fc": "int8", "c": "fp16"}
    counts = kernel_counts(plan)
    assert (counts.int8_compute, counts.fp_compute) == (1, 1)
    assert plan.kernels[0].nodes == ["fc/Gemm", "fc/Add"]


def test_a_log_without_a_plan():
    with pytest.raises(BuildError, match="0 kernel plans instead of one"):
        parse_plan("INFO: nothing here", "tensorrt-rtx")


def test_a_log_with_two_plans():
    with pytest.raises(BuildError, match="2 kernel plans instead of one"):
        parse_plan("VERBOSE: Layers:\n\nVERBOSE: Layers:\n", "tensorrt-rtx")


def test_a_line_of_an_unknown_format():
    with pytest.raises(BuildError, match=r"cannot read kernel 0 .*'Name: x, Type: y'"):
        plan_of("Name: x, Type: y")


def test_modules_of_nodes():
    assert module_of("a.0.conv/Conv") == "a.0.conv"
    assert module_of("a.0.conv#1/Conv") == "a.0.conv"
    assert module_of("a#1.input_quantizer/Cast_1") == "a.input_quantizer"
    assert module_of("Add") == ""


@pytest.mark.rtx
def test_attention_is_counted_apart(build, nets, tmp_path):
    net = nets.Net()
    x = net.quantize("attn.to_q", net.input("sample", [2, 64, 64]))
    heads = {}
    for name, order in {"to_q": [0, 2, 1, 3], "to_k": [0, 2, 3, 1], "to_v": [0, 2, 1, 3]}.items():
        y = net.node(f"attn.{name}/MatMul", "MatMul", [x, net.weight(f"attn.{name}", (64, 64), 1)])
        y = net.node(f"attn/Reshape_{name}", "Reshape", [y, net.constant(f"shape_{name}", np.array([2, -1, 4, 16]))])
        heads[name] = net.node(f"attn/Transpose_{name}", "Transpose", [y], perm=order)
    scores = net.node("attn/MatMul", "MatMul", [heads["to_q"], heads["to_k"]])
    shares = net.node("attn/Softmax", "Softmax", [scores], axis=-1)
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("attn/MatMul_1", "MatMul", [shares, heads["to_v"]])))
    counts = kernel_counts(plan)
    assert (counts.int8_compute, counts.fp_compute, counts.attention_kernels) == (1, 0, 1)
    assert counts.quantize_only == 1
    assert set(engine_coverage(plan, ["attn.to_q", "attn.to_k", "attn.to_v"]).values()) == {"int8"}


@pytest.mark.rtx
def test_both_parts_of_a_split_convolution_are_seen(build, nets, tmp_path):
    net = nets.Net()
    parts = [
        net.conv(f"conv#{index}", net.input(f"x{index}", [2, 32, 8, 8]), (32, 32, 3, 3), scale=0.05 + index / 100)
        for index in range(2)
    ]
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("conv/Add", "Add", parts)))
    assert engine_coverage(plan, ["conv#0", "conv#1"]) == {"conv#0": "int8", "conv#1": "int8"}
    assert {module for kernel in plan.kernels for module in kernel.modules} >= {"conv"}


@pytest.mark.rtx
def test_silent_fallbacks_show_as_floating_point(build, nets, tmp_path):
    net = nets.Net()
    x, y = net.input("x", [2, 32, 8, 8]), net.input("y", [2, 32, 8, 8])
    # a concatenation of differently scaled tensors
    joined = net.node("Concat", "Concat", [net.quantize("a", x, 0.05), net.quantize("b", y, 0.07)], axis=1)
    z = net.node("joined/Conv", "Conv", [joined, net.weight("joined", (32, 64, 3, 3), 0)])
    # integer weights alone
    z = net.node("weights/Conv", "Conv", [z, net.weight("weights", (32, 32, 1, 1), 0)])
    _, plan = build(net.save(tmp_path / "m.onnx", z))
    assert engine_coverage(plan, ["joined", "weights"]) == {"joined": "fp16", "weights": "fp16"}
    counts = kernel_counts(plan)
    # the weights are dequantized by kernels of their own, and still are weights
    assert (counts.int8_compute, counts.fp_compute, counts.attention_kernels) == (0, 2, 0)


@pytest.mark.rtx
def test_weight_scales_along_the_inputs_of_a_linear_layer(build, nets, tmp_path):
    net = nets.Net()
    x = net.quantize("l", net.input("x", [2, 64, 64]))
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("l/MatMul", "MatMul", [x, net.weight("l", (64, 48), 0)])))
    (kernel,) = (kernel for kernel in plan.kernels if "l/MatMul" in kernel.nodes)
    # both operands are integers in memory, and the product is not
    assert [t.dtype for t in plan_tensors(kernel.inputs) if len(t.dims) > 1 and min(t.dims) > 1] == [
        "int8",
        "int8",
    ]
    assert engine_coverage(plan, ["l"]) == {"l": "fp16"}


@pytest.mark.rtx
def test_a_single_row_becomes_a_pointwise_kernel(build, nets, tmp_path):
    net = nets.Net()
    x = net.linear("first", net.quantize("first", net.input("t", [1, 64])), (64, 128))
    _, plan = build(net.save(tmp_path / "m.onnx", net.float_linear("second", x, (128, 64))))
    assert engine_coverage(plan, ["first", "second"]) == {"first": "int8", "second": "fp16"}


@pytest.mark.rtx
@pytest.mark.parametrize(("body", "compute"), [("fp32", "int8"), ("fp16", "fp16")])
def test_int4_weights_compute_as_int8_only_without_casts(build, nets, tmp_path, body, compute):
    net = nets.Net(body)
    x = net.quantize("l", net.input("x", [2, 64, 128]))
    codes, scale = net.int4("codes", (128, 64)), net.constant("scale", np.full(64, 0.1, np.float32))
    w = net.node("l.weight_quantizer/DequantizeLinear", "DequantizeLinear", [codes, scale], axis=1)
    w = net.cast("l.weight_quantizer/Cast", w, TensorProto.FLOAT16)
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("l/MatMul", "MatMul", [x, w])))
    assert engine_coverage(plan, ["l"]) == {"l": compute}


@pytest.mark.rtx
def test_int4_weights_in_a_half_precision_body_compute_as_int8_between_casts(build, nets, tmp_path):
    """FP32 operands, one Cast behind the product: the builder widens the codes in a kernel of their own."""
    net = nets.Net("fp16")
    x = net.cast("l.input_quantizer/Cast", net.input("x", [2, 64, 128]), TensorProto.FLOAT)
    scale, zero = net.constant("step", np.float32(0.05)), net.constant("zero", np.int8(0))
    x = net.node("l.input_quantizer/QuantizeLinear", "QuantizeLinear", [x, scale, zero])
    x = net.node("l.input_quantizer/DequantizeLinear", "DequantizeLinear", [x, scale, zero])
    codes, scales = net.int4("codes", (128, 64)), net.constant("scale", np.full(64, 0.1, np.float32))
    w = net.node("l.weight_quantizer/DequantizeLinear", "DequantizeLinear", [codes, scales], axis=1)
    y = net.cast("l/Cast", net.node("l/MatMul", "MatMul", [x, w]), TensorProto.FLOAT16)
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("l/Add", "Add", [y, net.floats("bias", 64)])))
    assert engine_coverage(plan, ["l"]) == {"l": "int8"}
    counts = kernel_counts(plan)
    assert (counts.int8_compute, counts.fp_compute, counts.attention_kernels) == (1, 0, 0)
    widening = [kernel for kernel in plan.kernels if any("int4" in item for item in kernel.inputs)]
    assert [plan_tensors(kernel.outputs)[0].dtype for kernel in widening] == ["int8"]


def test_the_kernel_that_widens_int4_codes_is_no_compute():
    """Its output is a constant, so that the product behind it counts as a layer, and as an integer one."""
    widen = line("__myl_Cast_myl0_1", "kgen", [], [("w4", "128,64", "Int4")], [("w8", "128,64", "Int8")], ["l/MatMul"])
    gemm = line(
        "l/MatMul_myl0_2",
        "gemm",
        [("x", "128,128", "Int8"), ("w8", "128,64", "Int8")],
        [("alpha", "1", "Float"), ("beta", "1", "Float")],
        [("y", "128,64", "Float")],
        ["l/MatMul"],
    )
    plan = plan_of(widen, gemm)
    assert engine_coverage(plan, ["l"]) == {"l": "int8"}
    counts = kernel_counts(plan)
    assert (counts.kernels, counts.int8_compute, counts.fp_compute, counts.attention_kernels) == (2, 1, 0, 0)


@pytest.mark.rtx
def test_a_computed_bias_in_a_built_plan(build, nets, tmp_path):
    """The unit-scale form with a zero point per step: a sum of whole numbers, then both scales."""
    net = nets.Net("fp32")
    x = net.quantize("c", net.input("x", [2, 32, 8, 8]), scale=1.0)
    codes = net.constant("codes", net.random.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8))
    one, zero = net.constant("one", np.float32(1)), net.constant("zero", np.int8(0))
    w = net.node("c.weight_quantizer/DequantizeLinear", "DequantizeLinear", [codes, one, zero])
    step = net.input("step", [1, 1, 1, 1])
    shift = net.node("c/Mul_1", "Mul", [net.floats("sums", (1, 32, 1, 1)), step])
    y = net.node("c/Add", "Add", [net.node("c/Conv", "Conv", [x, w], pads=[1, 1, 1, 1]), shift])
    _, plan = build(net.save(tmp_path / "m.onnx", net.node("c/Mul", "Mul", [y, step])))
    (kernel,) = (kernel for kernel in plan.kernels if kernel.kind == "correlation")
    # the builder puts the sum into the convolution, as its second operand
    assert [tensor.dtype for tensor in plan_tensors(kernel.inputs)][:2] == ["int8", "fp32"]
    assert engine_coverage(plan, ["c"]) == {"c": "int8"}
