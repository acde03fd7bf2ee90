"""Attention in its plain form: one scale, one transposition; other products stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.graph.runner import PassReport
from qdexport.passes.plain_attention import PlainAttention

B, H, L, D = 2, 3, 5, 4

FLATTENED = (
    '["attn/Reshape"] k3 = Reshape(kt, flat)\n'
    '["attn/Transpose"] kx = Transpose<perm = [0, 2, 1]>(k3)\n'
    '["attn/Reshape_1"] k4 = Reshape(kx, whole)\n'
)
SHAPES = {"flat": np.array([B * H, L, D]), "whole": np.array([B, H, D, L])}


def attention(graphs, *, keys=FLATTENED, left=0.5, right=0.5, kind="float", shapes=SHAPES, tail=""):
    dtype = np.float16 if kind == "float16" else np.float32
    return graphs.model_of(
        f"{kind}[{B}, {H}, {L}, {D}] q, {kind}[{B}, {L}, {H}, {D}] k",
        f"{kind}[{B}, {H}, {L}, {L}] y",
        '["attn/Transpose_1"] kt = Transpose<perm = [0, 2, 1, 3]>(k)\n'
        f"{keys}"
        '["attn/Mul"] qs = Mul(q, left)\n'
        '["attn/Mul_1"] ks = Mul(k4, right)\n'
        '["attn/MatMul"] p = MatMul(qs, ks)\n'
        + (tail or '["attn/Softmax"] y = Softmax<axis: int = -1>(p)'),
        {"left": np.array(left, dtype), "right": np.array(right, dtype), **shapes},
    )


def feeds(noise, dtype=np.float32):
    """Quarters: sums of products are exact in every order, and so for every layout that BLAS is given."""
    return {
        "q": (noise.integers(-8, 9, (B, H, L, D)) * 0.25).astype(dtype),
        "k": (noise.integers(-8, 9, (B, L, H, D)) * 0.25).astype(dtype),
    }


def test_scales_and_transpositions_are_merged(graphs, noise):
    """Powers of two: scaling rounds nothing, so every bit stays."""
    ran = graphs.run(attention(graphs), PlainAttention(), feeds(noise))
    assert ran.ops == ["Mul", "Transpose", "MatMul", "Softmax"]
    assert list(ran.nodes("Transpose")[0].attributes["perm"].as_ints()) == [0, 2, 3, 1]
    assert ran.nodes("Mul")[0].inputs[1].const_value.numpy() == 0.25
    assert ran.report.touched == ["attn"]
    ran.assert_equal()


@pytest.mark.parametrize(("kind", "unit"), [("float", 2.0**-24), ("float16", 2.0**-11)])
def test_any_scale_differs_by_roundings_only(graphs, noise, kind, unit):
    """Scores of some 10 at most: four products, each rounded up to three times in either form."""
    root = float(np.sqrt(1 / np.sqrt(D + 1)))
    dtype = np.float16 if kind == "float16" else np.float32
    ran = graphs.run(attention(graphs, left=root, right=root, kind=kind), PlainAttention(), feeds(noise, dtype))
    assert ran.ops == ["Mul", "Transpose", "MatMul", "Softmax"]
    for before, after in zip(ran.before, ran.after, strict=True):
        np.testing.assert_allclose(after["y"], before["y"], rtol=0, atol=2 * 4 * 4 * unit * 10)


def test_a_mask_between_product_and_softmax(graphs, noise):
    tail = '["attn/Add"] m = Add(p, mask)\n["attn/Softmax"] y = Softmax<axis: int = -1>(m)'
    mask = np.where(np.arange(L) < 3, 0, -1e4).astype(np.float32)
    ran = graphs.run(attention(graphs, tail=tail, shapes={**SHAPES, "mask": mask}), PlainAttention(), feeds(noise))
    assert ran.ops == ["Mul", "Transpose", "MatMul", "Add", "Softmax"]
    ran.assert_equal()


def test_another_flattening_stays(graphs, noise):
    """``[B, H, L, D] -> [B, H L, D]`` is no transposition of the last two axes."""
    shapes = {"flat": np.array([B, H * L, D]), "whole": np.array([B, H, D, L])}
    ran = graphs.run(attention(graphs, shapes=shapes), PlainAttention(), feeds(noise))
    assert ran.ops.count("Reshape") == 2
    ran.assert_equal()


def test_a_product_without_softmax_is_left_alone(graphs, noise):
    ran = graphs.run(attention(graphs, tail='["attn/Relu"] y = Relu(p)'), PlainAttention(), feeds(noise))
    assert ran.ops.count("Mul") == 2
    assert ran.report.touched == []


def test_keys_scaled_alone_say_why_they_stay(graphs):
    model = graphs.model_of(
        f"float[{B}, {H}, {L}, {D}] q, float[{B}, {H}, {D}, {L}] k",
        f"float[{B}, {H}, {L}, {L}] y",
        '["attn/Mul"] ks = Mul(k, c)\n["attn/MatMul"] p = MatMul(q, ks)\n'
        '["attn/Softmax"] y = Softmax<axis: int = -1>(p)',
        {"c": np.float32(0.5)},
    )
    report = PassReport("plain-attention")
    PlainAttention().apply(model, graphs.context_of(), report)
    assert [item.reason for item in report.skipped] == ["only the second operand is scaled"]
    assert report.touched == []
