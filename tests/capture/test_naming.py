"""Every node carries the torch module that it came from, in its name and its metadata."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qdexport.capture.naming import name_nodes
from qdexport.graph.dialect import LAYER_KEY

SCOPES = "pkg.torch.onnx.name_scopes"
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y)
<float[3,3] w = {1,2,3,4,5,6,7,8,9}>
{
  t = Relu(x)
  v = MatMul(t, w)
  u = Relu(v)
  y = Neg(u)
}"""


def named(
    scopes: list[list[str] | None], lengths: dict[str, int] | None = None, text: str = TEXT
) -> ir.Model:
    model = ir.from_onnx_text(text)
    for node, scope in zip(model.graph, scopes, strict=True):
        if scope is not None:
            node.metadata_props[SCOPES] = repr(scope)
            node.metadata_props["pkg.torch.onnx.stack_trace"] = "private"
    name_nodes(model, "denoiser", lengths or {})
    return model


def names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph]


def test_paths_are_relative_to_the_denoiser() -> None:
    model = named(
        [
            ["", "denoiser", "denoiser.act", "relu"],
            ["", "denoiser", "denoiser.blocks.0", "denoiser.blocks.0.to_q", "linear"],
            ["", "denoiser", "relu_1"],
            ["neg"],
        ]
    )
    assert names(model) == ["act/Relu", "blocks.0.to_q/MatMul", "/Relu", "/Neg"]
    assert [node.metadata_props for node in model.graph] == [
        {LAYER_KEY: path} for path in ("act", "blocks.0.to_q", "", "")
    ]


def test_equal_names_are_numbered_in_order() -> None:
    model = named(
        [["denoiser", "denoiser.act", "relu"], None, ["denoiser", "denoiser.act", "relu_1"], ["neg"]]
    )
    assert names(model)[0] == "act/Relu"
    assert names(model)[2] == "act/Relu_1"


def test_a_node_of_the_exporter_takes_the_parent_of_what_it_reads() -> None:
    model = named([["denoiser", "denoiser.a.b", "relu"], None, None, ["neg"]])
    assert [node.metadata_props[LAYER_KEY] for node in model.graph] == ["a.b", "a", "", ""]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("denoiser.resnets.slice(1, None, None).0", "resnets.1"),
        ("denoiser.resnets.slice(None, -1, None).1.conv1", "resnets.1.conv1"),
        ("denoiser.up.2.resnets.slice(1, None, None).1.act", "up.2.resnets.2.act"),
        ("denoiser.up.slice(0, 2, None).1.resnets.slice(1, None, 2).0.act", "up.1.resnets.1.act"),
        ("denoiser.resnets.slice(None, None, -1).0", "resnets.2"),
    ],
)
def test_slices_of_module_lists_are_resolved(scope: str, expected: str) -> None:
    """torch names a layer that is reached through ``self.resnets[1:]`` by the slice."""
    lengths = {"resnets": 3, "up.2.resnets": 3, "up": 3, "up.1.resnets": 3}
    model = named([[scope, "relu"], None, None, None], lengths)
    assert model.graph.node(0).metadata_props[LAYER_KEY] == expected


SPLIT = """<ir_version: 10, opset_import: ["" : 21, "qdexport" : 1]>
g (float[2,3] x0, float[2,3] x1) => (float[2,3] y)
<float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[1] s = {1}, float[1] z = {0}>
{
  w0 = qdexport.FakeQuantize<qmin: int = -8, qmax: int = 7, axis: int = -1>(w, s, z)
  w1 = qdexport.FakeQuantize<qmin: int = -8, qmax: int = 7, axis: int = -1>(w, s, z)
  y0 = MatMul(x0, w0)
  y1 = MatMul(x1, w1)
  y = Add(y0, y1)
}"""


def test_the_parts_of_a_split_layer_are_numbered() -> None:
    quantizers = [["denoiser", f"denoiser.c.weight_quantizers.{index}", "fake_quantize"] for index in (0, 1)]
    model = named([*quantizers, ["denoiser.c", "p"], ["denoiser.c", "q"], ["denoiser.c", "add"]], text=SPLIT)
    assert names(model)[2:] == ["c#0/MatMul", "c#1/MatMul", "c/Add"]


def test_several_products_of_a_module_that_is_no_split_layer_keep_its_name() -> None:
    """The two products of an attention have no quantized weights."""
    model = named(
        [
            ["denoiser", "denoiser.w", "fake_quantize"],
            ["denoiser", "denoiser.w", "fake_quantize"],
            ["denoiser.attn", "p"],
            ["denoiser.attn", "q"],
            ["denoiser.attn", "add"],
        ],
        text=SPLIT,
    )
    assert names(model)[2:] == ["attn/MatMul", "attn/MatMul_1", "attn/Add"]
