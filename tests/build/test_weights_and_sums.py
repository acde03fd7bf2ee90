"""Stored types of weight-only layers, and 16-bit sums of codes, as kernel plans show them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from qdexport.build.storage import engine_weight_types, storage_mismatches
from qdexport.build.sums import half_precision_sums
from qdexport.core.results import KernelFact, Plan, WeightStorage


def plan_of(*kernels: KernelFact) -> Plan:
    return Plan(target="tensorrt-rtx", kernels=list(kernels))


def kernel(kind, nodes, inputs, outputs=("fp16[2,8] y",), name="k"):
    return KernelFact(index=0, name=name, kind=kind, inputs=list(inputs), outputs=list(outputs), nodes=list(nodes))


@pytest.mark.parametrize(
    ("kernels", "found"),
    [
        ([kernel("runtime_fusion", ["l/MatMul"], ["fp16[2,64] x", "const int4[64,8] w", "const fp16[4,8] s"])], "int4"),
        (
            [
                kernel("kgen", ["l.weight_quantizer/DequantizeLinear"], ["const int8[64,8] w", "const fp32[1,8] s"]),
                kernel("gemm", ["l/MatMul"], ["fp16[2,64] x", "fp16[64,8] wide", "const fp32[1] alpha"]),
            ],
            "int8",
        ),
        ([kernel("gemm", ["l/MatMul"], ["fp16[2,64] x", "const fp16[64,8] folded"])], "fp16"),
        (  # a larger table in the same kernel is no weight of this layer
            [kernel("kgen", ["l/Gemm"], ["const fp32[1001,48] classes", "const int8[64,8] w", "const fp32[4,8] s"])],
            "int8",
        ),
        (  # scales of several merged layers may have the size of one layer's weight
            [kernel("gemm", ["l/MatMul"], ["fp16[2,64] x", "const int8[64,512] w", "const fp32[1,512] s"])],
            "int8",
        ),
        (  # narrow codes of one layer alone, beside a weight that was widened
            [kernel("gemm", ["l/MatMul", "m/MatMul"], ["const int8[64,8] w", "const fp16[64,8] folded"])],
            "fp16+int8",
        ),
        ([kernel("gemm", ["other/MatMul"], ["fp16[2,64] x", "const int4[64,8] w"])], "missing"),
    ],
)
def test_where_a_plan_keeps_a_weight(kernels, found):
    assert engine_weight_types(plan_of(*kernels), {"l": 512, "m": 512})["l"] == found


def test_a_layer_whose_codes_another_kernel_reads_needs_no_room():
    """A kernel also names products of which it does the last step alone."""
    kernels = [
        kernel("kgen", ["l.weight_quantizer/DequantizeLinear", "l/Gemm", "m/Gemm"], [
            "const fp16[1001,8] classes", "const int8[64,8] w", "const fp16[1,8] s"]),
        kernel("kgen", ["m.weight_quantizer/DequantizeLinear"], ["const int8[64,16] v", "const fp16[1,16] t"]),
    ]  # fmt: skip
    assert engine_weight_types(plan_of(*kernels), {"l": 512, "m": 1024}) == {"l": "int8", "m": "int8"}


def test_a_weight_that_the_builder_merged_with_others_is_followed():
    """The kernel that widens several weights at once names none of their layers."""
    kernels = [
        kernel("kgen", [], ["const int8[64,24] w", "const fp32[1,24] s"], ["fp16[64,24] wide"]),
        kernel("gemm", ["q/MatMul", "k/MatMul"], ["fp16[2,64] x", "fp16[64,24] wide", "const fp32[1] alpha"]),
    ]
    assert engine_weight_types(plan_of(*kernels), {"q": 512, "k": 512}) == {"q": "int8", "k": "int8"}


def test_weights_that_are_stored_otherwise_are_named():
    storage = {
        "a": WeightStorage(planned="int4", onnx="int4", engine="int4"),
        "b": WeightStorage(planned="int4", onnx="int4", engine="fp16"),
        "c": WeightStorage(planned="int8", onnx="float"),
    }
    assert storage_mismatches(storage) == [
        "b: weight planned as int4, stored as int4 in the ONNX file, as fp16 in the engine",
        "c: weight planned as int8, stored as float in the ONNX file",
    ]


def products(nets, path, *, half_scales):
    """Two INT8 products in FP16 with scales per channel; with FP16 scales the builder stores bare sums."""
    net = nets.Net("fp16")
    x = net.input("x", [2, 64, 128])
    if not half_scales:
        x = net.quantize("l", x)
        return net.save(path, net.linear("l", x, (128, 96)))
    scale, zero = net.constant("xs", np.float16(0.05)), net.constant("xz", np.int8(0))
    x = net.node("l.input_quantizer/QuantizeLinear", "QuantizeLinear", [x, scale, zero])
    x = net.node("l.input_quantizer/DequantizeLinear", "DequantizeLinear", [x, scale, zero])
    codes = net.constant("wc", net.random.integers(-127, 128, (128, 96)).astype(np.int8))
    scales, zeros = net.constant("ws", np.full(96, 1e-3, np.float16)), net.constant("wz", np.zeros(96, np.int8))
    w = net.node("l.weight_quantizer/DequantizeLinear", "DequantizeLinear", [codes, scales, zeros], axis=1)
    return net.save(path, net.node("l/MatMul", "MatMul", [x, w]), TensorProto.FLOAT16)


@pytest.mark.rtx
def test_sums_in_half_precision_are_found_where_the_builder_makes_them(build, nets, tmp_path):
    """FP16 scales are what qdexport never writes: it has to be seen if a builder did the same to FP32 ones."""
    _, plan = build(products(nets, tmp_path / "half.onnx", half_scales=True))
    (sentence,) = half_precision_sums(plan, {"l"})
    assert sentence.startswith("l: its sums of products leave ")
    assert half_precision_sums(plan, set()) == []  # one scale per tensor is multiplied inside the product
    _, plan = build(products(nets, tmp_path / "single.onnx", half_scales=False))
    assert half_precision_sums(plan, {"l"}) == []
