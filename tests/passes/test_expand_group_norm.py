"""GroupNorm of groups that stay small is written out; large, unknown and affine ones stay, with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.graph.evaluate import evaluate
from qdexport.graph.runner import PassReport
from qdexport.passes.expand_group_norm import ExpandGroupNorm


def norm(graphs, shape="2, 4, 24", kind="float", scale=1.0, bias=0.0):
    dtype = np.float16 if kind == "float16" else np.float32
    return graphs.model_of(
        f"{kind}[{shape}] x",
        f"{kind}[{shape}] y",
        '["norm1/InstanceNormalization"] n = InstanceNormalization<epsilon: float = 1e-5>(x, one, zero)\n'
        '["norm1/Relu"] y = Relu(n)',
        {"one": np.full(4, scale, dtype), "zero": np.full(4, bias, dtype)},
    )


@pytest.mark.parametrize(("kind", "bound"), [("float", 2e-6), ("float16", 2e-3)])
def test_small_groups_are_written_out(graphs, noise, kind, bound):
    """FP32: sums of 24 terms in another order, some units of 6e-8; FP16: the result is rounded to 11 bits."""
    x = (noise.standard_normal((2, 4, 24)) * 3 + 5).astype(np.float16 if kind == "float16" else np.float32)
    model = norm(graphs, kind=kind)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=2, keepdims=True)
    expected = np.maximum(centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5), 0)
    ran = graphs.run(model, ExpandGroupNorm(), {"x": x})
    assert "InstanceNormalization" not in ran.ops
    assert ran.ops.count("ReduceMean") == 2
    assert ran.ops.count("Cast") == (2 if kind == "float16" else 0)
    assert ran.report.touched == ["norm1"]
    result = evaluate(model, {"x": x})["y"]
    assert result.dtype == x.dtype
    assert np.abs(result - expected).max() < bound


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shape": "1, 4, 31001"}, "a group of 31001 elements is above 31000"),
        ({"shape": "1, 4, L"}, "the size of a group is not known before it runs"),
        ({"scale": 2.0}, "its own scale and bias are not 1 and 0"),
        ({"bias": 0.5}, "its own scale and bias are not 1 and 0"),
    ],
)
def test_other_norms_stay_and_say_why(graphs, options, reason):
    model = norm(graphs, **options)
    report = PassReport("expand-group-norm")
    ExpandGroupNorm().apply(model, graphs.context_of(), report)
    assert [node.op_type for node in model.graph] == ["InstanceNormalization", "Relu"]
    assert [(item.node, item.reason) for item in report.skipped] == [("norm1/InstanceNormalization", reason)]
    assert report.touched == []


def context_with(graphs, high):
    """A network whose height may be up to ``high``."""
    height = Dim(name="height", low=4, best=8, high=high)
    sample = TensorSpec(name="x", role="sample", dtype="float32", dims=(height,))
    return replace(graphs.context_of(), io=IoSpec(inputs=(sample,), outputs=()))


@pytest.mark.parametrize(("high", "written_out"), [(100, True), (400, False)])
def test_a_group_counts_at_its_largest(graphs, noise, high, written_out):
    """Groups of 2 channels of a height by 50: at 100 they have 10,000 elements, at 400 40,000."""
    model = graphs.model_of(
        "float[2, 8, height, 50] x",
        "float[2, 4, L] y",
        '["norm/Reshape"] groups = Reshape(x, sizes)\n'
        '["norm/InstanceNormalization"] n = InstanceNormalization<epsilon: float = 1e-5>(groups, one, zero)\n'
        '["norm/Relu"] y = Relu(n)',
        {"sizes": np.array([0, 4, -1]), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)},
    )
    feeds = [{"x": noise.standard_normal((2, 8, size, 50)).astype(np.float32)} for size in (4, 12)]
    ran = graphs.run(model, ExpandGroupNorm(), feeds, context_with(graphs, high))
    assert ("InstanceNormalization" not in ran.ops) == written_out
    assert [item.reason for item in ran.report.skipped] == (
        [] if written_out else ["a group of 40000 elements is above 31000"]
    )
    # sums of up to 1,200 terms of order 1 in another order
    ran.assert_close(terms=1200, magnitude=1.0)
