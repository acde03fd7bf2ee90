"""Labels outside the table of classes read NaN at the output, whatever stands between; others their own rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.io_spec import Dim, TensorSpec
from qdexport.graph.evaluate import evaluate
from qdexport.passes.guard_labels import GuardLabels

CLASSES = 5
BODY = """
["class_embedding/Gather"] emb = Gather(table, labels)
["resnets.0/Reshape"] wide = Reshape(emb, shape)
["resnets.0/Add"] h = Add(x, wide)
["conv/QuantizeLinear"] q = QuantizeLinear(h, s, zero)
["conv/DequantizeLinear"] y = DequantizeLinear(q, s, zero)
"""


def context(graphs, dtype="int64"):
    rows = Dim(low=2, best=2, high=2)
    labels = TensorSpec(name="labels", role="class_labels", dtype=dtype, dims=(rows,))
    base = graphs.context_of()
    return replace(base, io=base.io.model_copy(update={"inputs": (*base.io.inputs, labels)}))


def network(graphs, noise, body=BODY, **more):
    table = noise.normal(size=(CLASSES, 3)).astype(np.float32)
    constants = {"table": table, "shape": np.array([-1, 3, 1, 1]), "s": np.float32(0.5), "zero": np.int8(0), **more}
    return graphs.model_of("float[2,3,4,4] x, int64[2] labels", "float[2,3,4,4] y", body, constants)


def feeds(noise, pairs):
    x = noise.normal(size=(2, 3, 4, 4)).astype(np.float32)
    return [{"x": x, "labels": np.array(pair)} for pair in pairs]


def test_a_label_outside_the_table_is_nan_for_its_row_alone(graphs, noise):
    inside = [(0, 4), (3, 3)]
    outside = [(2, -1), (2, -5), (2, -1000), (2, 5), (2, 999)]
    with np.errstate(invalid="ignore"):
        model = network(graphs, noise)
        every = feeds(noise, inside)
        ran = graphs.run(model, GuardLabels(), every, context(graphs))
        ran.assert_equal()
        for feed in feeds(noise, outside):
            result = evaluate(ran.model, feed)["y"]
            assert np.isfinite(result[0]).all()
            assert np.isnan(result[1]).all()
    assert ran.report.touched == ["class_embedding"]
    (table, warning) = (node.inputs[0].const_value.numpy() for node in ran.nodes("Gather"))
    assert {table.shape, warning.shape} == {(CLASSES + 1, 3), (CLASSES + 1, 1)}


def test_tables_of_one_length_share_the_guard(graphs, noise):
    """DiT has one in each block."""
    body = BODY.replace(
        '["resnets.0/Reshape"] wide = Reshape(emb, shape)',
        '["blocks.1/Gather"] second = Gather(other, labels)\n["blocks.1/Add"] both = Add(emb, second)\n'
        '["resnets.0/Reshape"] wide = Reshape(both, shape)',
    )
    other = noise.normal(size=(CLASSES, 3)).astype(np.float32)
    ran = graphs.run(network(graphs, noise, body, other=other), GuardLabels(), feeds(noise, [(0, 4)]), context(graphs))
    ran.assert_equal()
    assert ran.ops.count("Gather") == 3  # two tables and the warning
    assert ran.ops.count("Min") == ran.ops.count("Max") == 1


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_a_network_without_a_table_is_left_alone(graphs, noise, dtype):
    body = '["a/Cast"] f = Cast<to: int = 1>(labels)\n["a/Reshape"] r = Reshape(f, shape)\n["a/Add"] y = Add(x, r)\n'
    model = graphs.model_of(
        "float[2,3,4,4] x, int64[2] labels", "float[2,3,4,4] y", body, {"shape": np.array([-1, 1, 1, 1])}
    )
    if dtype == "float32":
        next(value for value in model.graph.inputs if value.name == "labels").dtype = ir.DataType.INT64
    ran = graphs.run(model, GuardLabels(), feeds(noise, [(0, 4)]), context(graphs, dtype))
    assert not ran.report.changed
    plain = graphs.run(network(graphs, noise), GuardLabels(), feeds(noise, [(0, 4)]), graphs.context_of())
    assert not plain.report.changed  # nothing says that `labels` are classes
