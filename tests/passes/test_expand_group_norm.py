"""GroupNorm is written in the form that the table names, at its largest size; affine ones stay, with the reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qdexport.core.forms import FormEntry, FormTable
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.graph.evaluate import evaluate
from qdexport.graph.forms import form_site
from qdexport.graph.runner import PassReport
from qdexport.passes.expand_group_norm import ExpandGroupNorm

GROUPS = 4


def norm(graphs, shape="2, 4, 24", kind="float", scale=1.0, bias=0.0):
    dtype = np.float16 if kind == "float16" else np.float32
    return graphs.model_of(
        f"{kind}[{shape}] x",
        f"{kind}[{shape}] y",
        '["norm1/InstanceNormalization"] n = InstanceNormalization<epsilon: float = 1e-5>(x, one, zero)\n'
        '["norm1/Relu"] y = Relu(n)',
        {"one": np.full(GROUPS, scale, dtype), "zero": np.full(GROUPS, bias, dtype)},
    )


def image_norm(graphs, batch="2", channels=12, kind="float", height="4"):
    """GroupNorm of ``[N, C, height, 2]`` as PyTorch exports it, with SiLU and a quantizer behind it."""
    dtype = np.float16 if kind == "float16" else np.float32
    lines = [
        '["norm1/Reshape"] g = Reshape(x, grouped)',
        '["norm1/InstanceNormalization"] n = InstanceNormalization<epsilon: float = 1e-5>(g, one, zero)',
        '["after/Reshape"] m = Reshape(n, image)',
        '["norm1/Mul"] a = Mul(m, gain)',
        '["norm1/Add"] b = Add(a, gain)',
        '["act/Sigmoid"] s = Sigmoid(b)',
        '["act/Mul"] t = Mul(b, s)',
        graphs.quantize("conv.input_quantizer", "y", "t, scale, zero_point", -128, 127),
    ]
    constants = {
        "grouped": np.array([0, GROUPS, -1]),
        "image": np.array([0, channels, -1, 2]),
        "one": np.ones(GROUPS, dtype),
        "zero": np.zeros(GROUPS, dtype),
        "gain": np.linspace(0.5, 1.5, channels).reshape(channels, 1, 1).astype(dtype),
        "scale": np.array([0.03], np.float32),
        "zero_point": np.zeros(1, np.float32),
    }
    shape = f"{kind}[{batch}, {channels}, {height}, 2]"
    return graphs.model_of(f"{shape} x", f"{shape} y", "\n".join(lines), constants)


def context(graphs, form):
    table = FormTable(target="tensorrt-rtx").forced({"group-norm": form})
    return dataclasses.replace(graphs.context_of(), forms=table)


def reference(x, groups=GROUPS):
    wide = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    centred = wide - wide.mean(axis=2, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5)).reshape(x.shape)


@pytest.mark.parametrize(("kind", "bound"), [("float", 2e-6), ("float16", 2e-3)])
def test_two_passes(graphs, noise, kind, bound):
    """FP32: sums of 24 terms in another order, some units of 6e-8; FP16: the result is rounded to 11 bits."""
    x = (noise.standard_normal((2, GROUPS, 24)) * 3 + 5).astype(np.float16 if kind == "float16" else np.float32)
    model = norm(graphs, kind=kind)
    ran = graphs.run(model, ExpandGroupNorm(), {"x": x}, context(graphs, "two-pass"))
    assert "InstanceNormalization" not in ran.ops
    assert ran.ops.count("ReduceMean") == 2
    assert ran.ops.count("Cast") == (2 if kind == "float16" else 0)
    assert ran.report.touched == ["norm1"]
    result = evaluate(model, {"x": x})["y"]
    assert result.dtype == x.dtype
    assert np.abs(result - np.maximum(reference(x), 0)).max() < bound


@pytest.mark.parametrize(("kind", "bound"), [("float", 2e-6), ("float16", 2e-3)])
def test_channels_as_parts(graphs, noise, kind, bound):
    """Means of channels far apart are the hard case of joining variances; the bounds are those of two passes."""
    offsets = np.arange(12).reshape(1, 12, 1, 1) * 4 - 20
    x = (noise.standard_normal((2, 12, 4, 2)) + offsets).astype(np.float16 if kind == "float16" else np.float32)
    model = image_norm(graphs, kind=kind)
    ran = graphs.run(model, ExpandGroupNorm(), {"x": x}, context(graphs, "channel-parts"))
    assert "InstanceNormalization" not in ran.ops
    assert [len(node.outputs) for node in ran.nodes("Split")] == [3, 3]
    assert ran.ops.count("ReduceMean") == 2
    # one cast for each of the two kernels that read the tensor, and one of the result
    assert ran.ops.count("Cast") == (3 if kind == "float16" else 0)
    result = ran.at("after/Reshape", {"x": x})
    assert np.abs(result - reference(x)).max() < bound
    codes = (np.abs(after["y"] - before["y"]).max() for before, after in zip(ran.before, ran.after, strict=True))
    # a tie may fall the other way: one step of the quantizer, and two roundings of numbers below 4 to FP16
    assert max(codes) <= 0.03 + 2 * 2.0**-9


def test_the_number_of_images_may_be_unknown(graphs, noise):
    x = noise.standard_normal((3, 12, 4, 2)).astype(np.float32)
    model = image_norm(graphs, batch="N")
    ran = graphs.run(model, ExpandGroupNorm(), {"x": x}, context(graphs, "channel-parts"))
    assert ran.ops.count("Split") == 2
    assert np.abs(ran.at("after/Reshape", {"x": x}) - reference(x)).max() < 2e-6


def test_height_and_width_may_be_known_at_run_time_only(graphs, noise):
    """The channels of a group are known, and that is what the parts are made of."""
    feeds = [{"x": noise.standard_normal((2, 12, size, 2)).astype(np.float32)} for size in (4, 9)]
    sample = TensorSpec(name="x", role="sample", dtype="float32", dims=(Dim(name="H", low=2, best=4, high=9),))
    given = dataclasses.replace(context(graphs, "channel-parts"), io=IoSpec(inputs=(sample,), outputs=()))
    ran = graphs.run(image_norm(graphs, height="H"), ExpandGroupNorm(), feeds, given)
    assert [len(node.outputs) for node in ran.nodes("Split")] == [3, 3]
    for item in feeds:
        assert np.abs(ran.at("after/Reshape", item) - reference(item["x"])).max() < 2e-6


def test_one_channel_per_group_is_one_part(graphs, noise):
    x = noise.standard_normal((2, GROUPS, 4, 2)).astype(np.float32)
    ran = graphs.run(
        image_norm(graphs, channels=GROUPS), ExpandGroupNorm(), {"x": x}, context(graphs, "channel-parts")
    )
    assert "Split" not in ran.ops
    assert "InstanceNormalization" not in ran.ops


def test_the_signature_says_what_follows(graphs):
    model = image_norm(graphs)
    report = PassReport("expand-group-norm")
    ExpandGroupNorm().apply(model, context(graphs, "operator"), report)
    node = next(node for node in model.graph if node.op_type == "InstanceNormalization")
    assert form_site(node) == (
        "group-norm",
        {"dtype": "fp32", "then": "silu+quantize", "elements": 24, "channels": 12, "batch": 2},
    )
    assert report.touched == []
    assert report.chosen["norm1"].startswith("operator")


def test_the_shipped_table_knows_small_and_large_groups(graphs):
    forms = {}
    for elements in (1024, 4096, 20480, 40960):
        signature = {"dtype": "fp16", "then": "silu+quantize", "elements": elements, "channels": 320, "batch": 2}
        forms[elements] = graphs.context_of().form_of("group-norm", signature, "operator").form
    assert forms == {1024: "two-pass", 4096: "two-pass", 20480: "channel-parts", 40960: "channel-parts"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
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
    entries = tuple(
        FormEntry(operator="group-norm", signature={"elements": size}, form=form)
        for size, form in ((10_000, "two-pass"), (40_000, "operator"))
    )
    forms = FormTable(target="tensorrt-rtx", entries=entries)
    return dataclasses.replace(graphs.context_of(), io=IoSpec(inputs=(sample,), outputs=()), forms=forms)


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
    assert ran.report.chosen["norm"].startswith("two-pass" if written_out else "operator")
    # sums of up to 1,200 terms of order 1 in another order
    ran.assert_close(terms=1200, magnitude=1.0)


def test_a_target_without_a_table_keeps_the_operator(graphs, noise):
    x = noise.standard_normal((2, GROUPS, 24)).astype(np.float32)
    empty = dataclasses.replace(graphs.context_of(), forms=FormTable(target="onnxruntime"))
    assert "InstanceNormalization" in graphs.run(norm(graphs), ExpandGroupNorm(), {"x": x}, empty).ops


def test_an_exact_entry_wins_over_a_near_one():
    near = FormEntry(operator="group-norm", signature={"elements": 100, "then": "other"}, form="two-pass")
    exact = FormEntry(operator="group-norm", signature={"elements": 90, "then": "quantize"}, form="operator")
    table = FormTable(target="t", entries=(near, exact))
    assert table.choose("group-norm", {"elements": 90, "then": "quantize"}, "x").form == "operator"
    assert table.choose("group-norm", {"elements": 90, "then": "other"}, "x").form == "two-pass"
    assert table.choose("attention", {"elements": 90}, "plain").form == "plain"
