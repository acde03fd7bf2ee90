"""Biases of q, k and v move into the products; other biased products keep theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdexport.core.target import TARGETS
from qdexport.passes.bias_in_product import BiasInProduct

N, L, HEADS, D = 1, 5, 2, 4
WIDTH = HEADS * D


def projections(graphs, noise, *, kind="float", names="qkv", perm="0, 2, 1, 3", rows=str(N), shape=None):
    """Numbers of a few bits, so that every sum is exact in either order."""
    dtype = np.float16 if kind == "float16" else np.float32
    constants = {"heads": np.array([0, L, HEADS, D])}
    lines, outputs = [], []
    for name in names:
        constants[f"w{name}"] = (noise.integers(-4, 5, (WIDTH, WIDTH)) * 0.5).astype(dtype)
        constants[f"b{name}"] = (noise.integers(-8, 9, WIDTH) * 0.25).astype(dtype)
        first, second = ("y", f"b{name}") if name != "k" else (f"b{name}", "y")  # either order of an Add's operands
        lines.append(
            f'["attn.{name}/MatMul"] m{name} = MatMul(x, w{name})\n'
            f'["attn.{name}/Add"] a{name} = Add({first.replace("y", "m" + name)}, {second.replace("y", "m" + name)})\n'
            f'["attn/Reshape"] r{name} = Reshape(a{name}, heads)\n'
            f'["attn/Transpose"] {name} = Transpose<perm = [{perm}]>(r{name})'
        )
        outputs.append(f"{shape or f'{kind}[{rows}, {HEADS}, {L}, {D}]'} {name}")
    return graphs.model_of(f"{kind}[{rows}, {L}, {WIDTH}] x", ", ".join(outputs), "\n".join(lines), constants)


def feeds(noise, dtype=np.float32, rows=N):
    return {"x": (noise.integers(-8, 9, (rows, L, WIDTH)) * 0.25).astype(dtype)}


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_three_biases_become_rows_of_the_weights(graphs, noise, kind):
    dtype = np.float16 if kind == "float16" else np.float32
    ran = graphs.run(projections(graphs, noise, kind=kind), BiasInProduct(), feeds(noise, dtype))
    assert ran.ops.count("Pad") == 1
    assert "Add" not in ran.ops
    assert ran.report.touched == ["attn.q", "attn.k", "attn.v"]
    for node in ran.nodes("MatMul"):
        weight = node.inputs[1].const_value.numpy()
        assert weight.shape == (WIDTH + 8, WIDTH)
        assert weight[WIDTH].any()
        assert not weight[WIDTH + 1 :].any()
        assert node.inputs[0].producer().op_type == "Pad"
    ran.assert_equal()


def test_two_projections_keep_their_biases(graphs, noise):
    """Keys and values of a cross-attention, for instance: nothing was gained."""
    ran = graphs.run(projections(graphs, noise, names="kv"), BiasInProduct(), feeds(noise))
    assert ran.ops.count("Add") == 2
    assert "fewer than three" in ran.report.skipped[0].reason


def test_what_does_not_become_heads_keeps_its_bias(graphs, noise):
    """Rows that are exchanged with nothing but their own columns: no heads of an attention."""
    model = projections(graphs, noise, perm="0, 1, 3, 2", shape=f"float[{N}, {L}, {D}, {HEADS}]")
    ran = graphs.run(model, BiasInProduct(), feeds(noise))
    assert ran.ops.count("Add") == 3
    assert ran.report.touched == []


def test_rows_that_are_known_at_run_time_only_keep_their_biases(graphs, noise):
    ran = graphs.run(projections(graphs, noise, rows="N"), BiasInProduct(), feeds(noise))
    assert ran.ops.count("Add") == 3
    assert "known only when it runs" in ran.report.skipped[0].reason


def test_targets_that_gain_nothing(graphs, noise):
    context = replace(graphs.context_of(), target=TARGETS["onnxruntime"])
    ran = graphs.run(projections(graphs, noise), BiasInProduct(), feeds(noise), context=context)
    assert ran.report.touched == []
