"""Costs of kernels: bytes and operations of plans written by hand, and of plans that the builder made."""

from __future__ import annotations

import pytest

from qdexport.build.plan_advice import plan_advice
from qdexport.build.plan_cost import plan_cost
from qdexport.core.gpus import gpu_named
from qdexport.core.results import KernelFact, Plan
from qdexport.errors import BuildError

GPU = gpu_named("rtx-4090")


def kernel(index, kind, inputs, outputs, name="k", modules=("layer",)):
    return KernelFact(
        index=index,
        name=name,
        kind=kind,
        inputs=list(inputs),
        outputs=list(outputs),
        tactic="",
        nodes=[],
        modules=list(modules),
    )


def cost_of(*kernels):
    return plan_cost(Plan(target="tensorrt-rtx", kernels=list(kernels)), GPU)


CONV = kernel(
    0,
    "correlation",
    ["int8[2,64,10,10] x", "const int8[32,64,3,3] w", "const fp32[1,32,1,1] s", "const fp32[1,32,1,1] t"],
    ["fp32[2,32,8,8] y"],
)
GEMM = kernel(
    1, "gemm", ["int8[128,64] x", "const int8[64,192] w", "const fp32[1] a", "const fp32[1] b"], ["fp32[128,192] y"]
)


def test_a_convolution_counts_its_window_and_every_operand_once():
    (conv,) = cost_of(CONV).kernels
    assert conv.role == "convolution"
    assert conv.dtype == "int8"
    assert conv.operations == 2 * (2 * 32 * 8 * 8) * (64 * 3 * 3)
    assert conv.weight_bytes == 32 * 64 * 9 + 2 * 32 * 4
    assert conv.activation_bytes == 2 * 64 * 10 * 10 + 2 * 32 * 8 * 8 * 4
    assert conv.compute_seconds == conv.operations / GPU.int8
    assert conv.memory_seconds == conv.bytes / GPU.bandwidth
    assert conv.seconds == max(conv.compute_seconds, conv.memory_seconds)
    assert conv.ideal_seconds < conv.seconds, "the ideal writes codes instead of FP32"


def test_a_product_with_a_weight_either_way_round():
    (gemm,) = cost_of(GEMM).kernels
    assert (gemm.role, gemm.operations) == ("product", 2 * 128 * 64 * 192)
    rows = GEMM.model_copy(update={"inputs": ["int8[2,64,64] x", *GEMM.inputs[1:]], "outputs": ["fp32[2,64,192] y"]})
    assert cost_of(rows).kernels[0].operations == gemm.operations


def test_attention_as_two_products_and_as_one_kernel():
    scores = kernel(0, "gemm", ["fp32[8,64,16] q", "fp32[8,16,77] k", "const fp32[1,1,1,1] a"], ["fp32[8,64,77] p"])
    mixed = kernel(1, "gemm", ["fp32[8,64,77] p", "fp32[8,77,16] v"], ["fp32[8,64,16] o"])
    apart = cost_of(scores, mixed)
    assert [item.role for item in apart.kernels] == ["attention", "attention"]
    assert [item.operations for item in apart.kernels] == [2 * 8 * 64 * 77 * 16] * 2
    assert not any(item.fused for item in apart.kernels)
    fused = kernel(
        0,
        "kgen",  # as TensorRT-RTX 1.7 says
        ["fp16[8,64,16] qkv", "fp16[8,16,77] qkv", "fp16[8,77,16] qkv"],
        ["int8[8,64,16] o"],
        name="_gemm_mha_v2_myl0_3",
    )
    (one,) = cost_of(fused).kernels
    assert one.fused
    assert one.dtype == "fp16"
    assert one.activation_bytes == 2 * 8 * 16 * (64 + 77 + 77) + 8 * 64 * 16
    assert one.operations == sum(item.operations for item in apart.kernels)


def test_a_widened_weight_is_a_weight_still():
    widen = kernel(0, "kgen", ["const int4[64,192] w"], ["int8[64,192] wide"], name="__myl_Cast")
    gemm = GEMM.model_copy(update={"inputs": ["int8[128,64] x", "int8[64,192] wide", "const fp32[1,192] s"]})
    cost = cost_of(widen, gemm)
    assert [item.role for item in cost.kernels] == ["widen", "product"]
    assert cost.kernels[0].weight_bytes == 64 * 192 * 1.5
    assert cost.kernels[0].activation_bytes == 0
    assert cost.kernels[1].operations == 2 * 128 * 64 * 192
    assert cost.share(["widen"]) == cost.kernels[0].seconds / cost.seconds


def test_a_kernel_is_named_by_its_layer():
    both = GEMM.model_copy(update={"modules": ["ff.net.2.input_quantizer", "ff.net.0", "ff.net.0.proj"]})
    assert cost_of(both).kernels[0].module == "ff.net.0"
    alone = GEMM.model_copy(update={"modules": ["conv_in.input_quantizer"]})
    assert cost_of(alone).kernels[0].module == "conv_in.input_quantizer"
    assert cost_of(GEMM.model_copy(update={"modules": []})).kernels[0].module == ""


def test_signals_and_jumps_move_nothing():
    signal = kernel(0, "signal", [], [])
    assert cost_of(signal, CONV).kernels == cost_of(CONV).kernels


def test_a_size_known_only_at_run_time_is_refused():
    with pytest.raises(BuildError, match=r"known only at run time: fp32\[-1,4\] [xy]; build for one fixed shape"):
        cost_of(kernel(0, "kgen", ["fp32[-1,4] x"], ["fp32[-1,4] y"]))


def test_an_unknown_type_is_refused():
    with pytest.raises(BuildError, match="unknown type"):
        cost_of(kernel(0, "kgen", ["complex64[4] x"], ["fp32[4] y"]))


def test_advice_points_from_kept_operators_and_copies_to_the_search():
    big = ["fp16[2,320,64,64] x"]
    norm = kernel(0, "kgen", big, ["int8[2,320,64,64] y"], name="__myl_SiluCastMulMinMaxRounCastGnor_myl0_3")
    move = kernel(1, "kgen", ["int8[16,4096,40] x"], ["int8[4096,2,8,40] y"], name="__myl_MoveReshTran_myl0_8")
    epilogue = kernel(2, "kgen", big, ["fp16[2,320,64,64] y"], name="__myl_MulCastAddMoveAdd_myl0_9")
    advice = plan_advice(cost_of(norm, move, epilogue))
    assert len(advice) == 2
    assert "1 kernels are GroupNorms kept as an operator" in advice[0]
    assert "1 kernels only copy or transpose" in advice[1]
    assert all("`qdexport search MODEL`" in sentence for sentence in advice)


def test_advice_names_what_takes_the_time():
    half = kernel(0, "gemm", ["fp16[128,64] x", "const fp16[64,192] w"], ["fp16[128,192] y"], modules=("ff.proj",))
    widen = kernel(1, "kgen", ["const int4[64,192] w"], ["int8[64,192] v"], name="__myl_Cast", modules=("to_q",))
    advice = plan_advice(cost_of(half, widen))
    assert len(advice) == 2
    assert "1 convolutions and products with weights compute in floating point" in advice[0]
    assert "(first: ff.proj)" in advice[0]
    assert "int4_storage: never" in advice[1]
    assert plan_advice(cost_of(CONV)) == []


def test_queries_and_keys_that_are_views_of_one_tensor():
    """A VAE's attention: one product made q, k and v, and the next one reads two parts of it."""
    scores = kernel(0, "gemm", ["fp16[1,32,8] qkv", "fp16[1,8,32] qkv", "const fp32[1] a"], ["fp16[1,32,32] y"])
    (cost,) = cost_of(scores).kernels
    assert cost.operations == 2 * 32 * 32 * 8
