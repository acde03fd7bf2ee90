"""Tokens as [length, batch, width] between the borders of a transformer block; other regions stay, with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.target import TARGETS
from qdexport.graph.dialect import SEQUENCE_FIRST_KEY
from qdexport.graph.runner import PassReport
from qdexport.passes.sequence_first import SequenceFirst

N, C, H, W, HEADS = 2, 6, 2, 4, 3
L, D = H * W, C // HEADS

ENTRY = '["t/Transpose"] last = Transpose<perm = [0, 2, 3, 1]>(x)\n["t/Reshape"] tokens = Reshape(last, rows)\n'
EXIT = (
    '["t/Reshape_9"] grid = Reshape(out, spatial)\n["t/Transpose_9"] y = Transpose<perm = [0, 3, 1, 2]>(grid)'
)
HEADS_OF = "".join(
    f'["attn/Reshape_{i}"] {i}h = Reshape({i}p, heads)\n["attn/Transpose_{i}"] {i}t = Transpose<perm = {perm}>({i}h)\n'
    for i, perm in (("q", "[0, 2, 1, 3]"), ("k", "[0, 2, 3, 1]"), ("v", "[0, 2, 1, 3]"))
)
ATTENTION = (
    '["to_q/MatMul"] qp = MatMul(n, wq)\n["to_k/MatMul"] kp = MatMul(n, wk)\n["to_v/MatMul"] vp = MatMul(n, wv)\n'
    + HEADS_OF
    + '["attn/MatMul"] s = MatMul(qt, kt)\n["attn/Softmax"] p = Softmax<axis: int = -1>(s)\n'
    '["attn/MatMul_1"] o = MatMul(p, vt)\n["attn/Transpose_3"] ot = Transpose<perm = [0, 2, 1, 3]>(o)\n'
    '["attn/Reshape_3"] a = Reshape(ot, rows)\n["to_out/MatMul"] ao = MatMul(a, wo)\n["to_out/Add"] ab = Add(ao, b)\n'
)
BLOCK = (
    '["norm/LayerNormalization"] n = LayerNormalization<axis: int = -1>(tokens, gain)\n'
    + ATTENTION
    + '["block/Add"] out = Add(ab, tokens)\n'
)


END = '["block/Add"] out = Add(ab, tokens)'
RESIDUAL = '["block/Add"] r = Add(ab, tokens)\n'


def network(graphs, noise, block=BLOCK, entry=ENTRY, end=EXIT, output=f"float[{N}, {C}, {H}, {W}] y", batch=N):
    weights = {name: noise.integers(-2, 3, (C, C)).astype(np.float32) * 0.25 for name in ("wq", "wk", "wv", "wo")}
    constants = {
        **weights,
        "gain": np.ones(C, np.float32),
        "b": np.arange(C, dtype=np.float32),
        "rows": np.array([batch, L, C]),
        "heads": np.array([batch, L, HEADS, D]),
        "spatial": np.array([batch, H, W, C]),
        "mixed": np.ones((batch, L, C), np.float32),
        "scale": np.float32([0.25, 0.5]),
        "zero": np.float32([0, 0]),
        "steps": np.array([0, 1]),
    }
    used = entry + block + end
    kept = {name: array for name, array in constants.items() if name in used}
    return graphs.model_of(f"float[{batch}, {C}, {H}, {W}] x", output, used, kept)


def feeds(noise, batch=N):
    return {"x": noise.standard_normal((batch, C, H, W)).astype(np.float32)}


def test_attention_reads_its_heads_in_place(graphs, noise):
    """Sums have the same terms in the same order, and nothing but places changes; BLAS may block them otherwise."""
    ran = graphs.run(network(graphs, noise), SequenceFirst(), feeds(noise))
    perms = [list(node.attributes["perm"].as_ints()) for node in ran.nodes("Transpose")]
    assert perms == [[2, 3, 0, 1], [1, 2, 0, 3], [1, 2, 3, 0], [1, 2, 0, 3], [2, 0, 1, 3], [2, 3, 0, 1]]
    assert list(ran.node("norm/LayerNormalization").outputs[0].shape) == [L, N, C]
    marked = [node.name for node in ran.nodes("MatMul") if SEQUENCE_FIRST_KEY in node.metadata_props]
    assert marked == ["to_q/MatMul", "to_k/MatMul", "to_v/MatMul", "to_out/MatMul"]
    assert ran.report.touched == ["t"]
    ran.assert_close(terms=8 * C, magnitude=16.0)


def test_data_movement_alone_changes_no_bit(graphs, noise):
    block = HEADS_OF.replace("qp", "tokens").replace("kp", "tokens").replace("vp", "tokens") + (
        '["attn/Transpose_k2"] k2 = Transpose<perm = [0, 1, 3, 2]>(kt)\n["attn/Add"] s = Add(qt, k2)\n'
        '["attn/Add_1"] o = Add(s, vt)\n["attn/Transpose_3"] ot = Transpose<perm = [0, 2, 1, 3]>(o)\n'
        '["attn/Reshape_3"] out = Reshape(ot, rows)\n'
    )
    ran = graphs.run(network(graphs, noise, block), SequenceFirst(), feeds(noise))
    assert ran.report.touched == ["t"]
    ran.assert_equal()


def test_other_targets_keep_their_layout(graphs, noise):
    context = replace(graphs.context_of(), target=TARGETS["onnxruntime"])
    ran = graphs.run(network(graphs, noise), SequenceFirst(), feeds(noise), context)
    assert ran.report.touched == []


def test_one_image_has_nothing_to_gain(graphs, noise):
    output = f"float[1, {C}, {H}, {W}] y"
    ran = graphs.run(network(graphs, noise, batch=1, output=output), SequenceFirst(), feeds(noise, 1))
    assert ran.report.touched == []
    assert ran.report.skipped == []


def test_tokens_without_attention_stay(graphs, noise):
    ran = graphs.run(network(graphs, noise, '["b/Mul"] out = Mul(tokens, b)\n'), SequenceFirst(), feeds(noise))
    assert ran.report.touched == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((END, f'{RESIDUAL}["block/Add_1"] out = Add(r, mixed)'), "mixed is no result of a node"),
        (("<axis: int = -1>(tokens, gain)", "<axis: int = 1>(tokens, mixed1)"), "normalizes over more than a token"),
        ((END, f'{RESIDUAL}["b/Softmax"] out = Softmax<axis: int = 1>(r)'), "b/Softmax (Softmax) reads tokens"),
        (("MatMul(a, wo)", "MatMul(wo2, a)"), "to_out/MatMul (MatMul) reads a of shape [2,8,6]"),
    ],
)
def test_other_uses_of_tokens_say_why(graphs, noise, change, reason):
    block = BLOCK.replace(*change)
    extra = {"mixed1": np.ones((L, C), np.float32), "wo2": np.ones((L, L), np.float32)}
    model = graphs.model_of(
        f"float[{N}, {C}, {H}, {W}] x",
        f"float[{N}, {C}, {H}, {W}] y",
        ENTRY + block + EXIT,
        {
            **{name: np.eye(C, dtype=np.float32) for name in ("wq", "wk", "wv", "wo")},
            "gain": np.ones(C, np.float32),
            "b": np.ones(C, np.float32),
            "mixed": np.ones((N, L, C), np.float32),
            "rows": np.array([N, L, C]),
            "heads": np.array([N, L, HEADS, D]),
            "spatial": np.array([N, H, W, C]),
            **extra,
        },
    )
    report = PassReport("sequence-first")
    SequenceFirst().apply(model, graphs.context_of(), report)
    assert report.touched == []
    assert [reason in item.reason for item in report.skipped] == [True], report.skipped


def test_a_row_per_image_stays(graphs, noise):
    """A scale per image broadcasts along the first axis."""
    quantizer = graphs.quantize("to_q.input_quantizer", "n", "tokens, scale, zero, row", -128, 127)
    block = BLOCK.replace(BLOCK.splitlines()[0], '["step_rows/Identity"] row = Identity(steps)\n' + quantizer)
    model = network(graphs, noise, block)
    report = PassReport("sequence-first")
    SequenceFirst().apply(model, graphs.context_of(), report)
    assert [item.reason for item in report.skipped] == ["to_q.input_quantizer has a row of its step table per image"]


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 2, 4), (3, 4, 2)])
def test_sizes_may_be_known_only_when_the_network_runs(graphs, noise, size):
    """Shapes that are computed are put in another order by a Gather; the batch may then be anything, also 1."""
    batch, height, width = size
    block = BLOCK.replace("rows", "tokens_shape").replace("heads", "heads_shape")
    shapes = (
        '["t/Shape"] n1 = Shape<start = 0, end = 1>(x)\n["t/Shape_1"] grid_sizes = Shape<start = 2>(x)\n'
        '["t/Concat"] tokens_shape = Concat<axis: int = 0>(n1, minus, width)\n'
        '["t/Concat_1"] heads_shape = Concat<axis: int = 0>(n1, minus, three, two)\n'
        '["t/Concat_2"] spatial_shape = Concat<axis: int = 0>(n1, grid_sizes, width)\n'
    )
    weights = {name: noise.integers(-2, 3, (C, C)).astype(np.float32) * 0.25 for name in ("wq", "wk", "wv", "wo")}
    sizes = {"minus": np.array([-1]), "width": np.array([C]), "three": np.array([HEADS]), "two": np.array([D])}
    model = graphs.model_of(
        f"float[batch, {C}, height, width] x",
        f"float[batch, {C}, height, width] y",
        shapes + ENTRY.replace("rows", "tokens_shape") + block + EXIT.replace("spatial", "spatial_shape"),
        {**weights, **sizes, "gain": np.ones(C, np.float32), "b": np.arange(C, dtype=np.float32)},
    )
    for node in model.graph:  # as after a capture, which gives the product of two sizes a name
        for value in node.outputs:
            dims = list(value.shape or ())
            if len(dims) >= 3 and str(dims[1]) not in {str(C), str(HEADS), "height"} and not isinstance(dims[1], int):
                dims[1] = "height*width"
                value.shape = ir.Shape(dims)
    x = noise.standard_normal((batch, C, height, width)).astype(np.float32)
    ran = graphs.run(model, SequenceFirst(), {"x": x})
    assert ran.report.touched == ["t"]
    tokens = ran.node("norm/LayerNormalization").outputs[0]
    assert [str(dim) for dim in tokens.shape] == ["height*width", "batch", str(C)]
    assert ran.ops.count("Gather") == 6  # entry, three to heads, one from heads, exit
    ran.assert_close(terms=8 * C, magnitude=16.0)


def test_sizes_that_are_copied_by_their_place_stay(graphs, noise):
    model = network(graphs, noise)
    model.graph.initializers["rows"].const_value = ir.tensor(np.array([0, L, C]))
    report = PassReport("sequence-first")
    SequenceFirst().apply(model, graphs.context_of(), report)
    assert [item.reason for item in report.skipped] == ["t/Reshape copies a size by its place"]
