from __future__ import annotations

from qdexport.build.audit import audit, floating_mismatches
from qdexport.core.results import KernelFact, Plan


def test_agreement():
    planned = {"a": "int8", "b": "int4", "c": "fp16", "d": "folded", "e#0": "int8"}
    onnx = {"a": "int8", "b": "int8", "c": "fp16", "e#0": "int8"}
    assert (
        audit(planned, onnx, {"a": "int8", "b": "int4", "c": "missing", "d": "missing", "e#0": "int8"}) == []
    )
    assert audit(planned, onnx, None) == []


def test_each_difference_is_a_sentence_with_all_values():
    planned = {"a": "int8", "b": "int8", "c": "int8", "d": "fp8"}
    onnx = {"a": "int8", "b": "fp16", "c": "int8", "d": "int8"}
    engine = {"a": "fp16", "b": "fp16", "d": "int8"}
    assert audit(planned, onnx, engine) == [
        "a: planned int8, int8 in the ONNX file, fp16 in the engine",
        "b: planned int8, fp16 in the ONNX file, fp16 in the engine",
        "c: planned int8, int8 in the ONNX file, missing in the engine",
        "d: planned fp8, int8 in the ONNX file, int8 in the engine",
    ]


def test_without_an_engine_only_the_file_is_compared():
    assert audit({"a": "int8"}, {}, None) == ["a: planned int8, missing in the ONNX file"]


def test_int4_may_compute_as_int8_but_not_the_reverse():
    assert audit({"a": "int4"}, {"a": "int8"}, {"a": "int8"}) == []
    assert len(audit({"a": "int8"}, {"a": "int4"}, {"a": "int8"})) == 1


def test_a_folded_layer_must_be_gone():
    assert audit({"a": "folded"}, {"a": "folded"}, {}) == []
    assert audit({"a": "folded"}, {"a": "fp32"}, {}) == [
        "a: planned folded, fp32 in the ONNX file, missing in the engine"
    ]


def test_a_floating_point_layer_must_not_become_narrow():
    assert audit({"a": "fp16"}, {"a": "fp32"}, {"a": "fp32"}) == []
    assert audit({"a": "fp16"}, {"a": "int8"}, None) == ["a: planned fp16, int8 in the ONNX file"]


def test_floating_point_networks():
    """What became part of something else is no mismatch; a stray type is, and so is attention in another one."""
    product = KernelFact(
        index=3, name="_gemm_mha_v2_myl0_3", kind="kgen", inputs=["fp32[1,4] q", "fp32[1,4] k"],
        outputs=["fp32[1,4] y"], modules=["layers.0.attn"],
    )  # fmt: skip
    plan = Plan(target="tensorrt-rtx", kernels=[product])
    onnx = {"a": "fp16", "b": "fp32", "c": "fp16"}
    assert floating_mismatches("fp16", onnx, {"a": "fp16", "b": "fp32", "c": "missing"}, plan) == [
        "b: planned fp16, fp32 in the ONNX file",
        "b: planned fp16, fp32 in the engine",
        "kernel 3 _gemm_mha_v2_myl0_3: planned fp16, fp32 in the engine",
    ]
    assert floating_mismatches("fp16", {"a": "fp16"}, None, None) == []
    layer = product.model_copy(update={"modules": ["a"]})  # a kernel of a layer is judged with its layer
    assert floating_mismatches("fp16", {"a": "fp16"}, {"a": "fp16"}, plan.model_copy(update={"kernels": [layer]})) == []
