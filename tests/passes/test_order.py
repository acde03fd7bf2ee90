"""The default order, and all passes together on one small network."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qdexport.graph.dialect import DOMAIN
from qdexport.graph.evaluate import evaluate
from qdexport.graph.runner import run_passes
from qdexport.passes import DEFAULT_ORDER, default_passes

STEPS = (900, 300, 1)


def test_every_pass_follows_what_it_must():
    names = [graph_pass.name for graph_pass in DEFAULT_ORDER]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name) for name in names)
    for index, graph_pass in enumerate(DEFAULT_ORDER):
        assert set(graph_pass.runs_after) <= set(names[:index]), graph_pass.name
        assert graph_pass.__doc__
    assert [type(graph_pass) for graph_pass in default_passes()] == list(DEFAULT_ORDER)


def test_every_pass_has_a_test_file_of_its_name():
    folder = Path(__file__).parent
    for graph_pass in DEFAULT_ORDER:
        assert (folder / f"test_{graph_pass.name.replace('-', '_')}.py").is_file(), graph_pass.name


def network(graphs, noise, body):
    """A convolution with step rows (unsigned 8-bit), time added, two linear layers behind equal quantizers.

    All numbers are dyadic and small, so that every sum is exact, in FP16 too.
    """
    narrow = np.float16 if body == "float16" else np.float32

    def weights(shape, reach):
        return (noise.integers(-reach, reach + 1, shape) * 0.5).astype(narrow)

    constants = {
        "wc": weights((4, 2, 3, 3), 2), "wq": weights((3, 4), 2), "wk": weights((3, 4), 2),
        "bc": (noise.integers(-4, 5, 4) * 0.25).astype(narrow),
        "bq": (noise.integers(-4, 5, 3) * 0.25).astype(narrow),
        "sw": np.full((1, 4), 0.5, np.float32), "zw": np.zeros((1, 4), np.float32),
        "s3": np.full((1, 3), 0.5, np.float32), "z3": np.zeros((1, 3), np.float32),
        "sx": np.float32([0.5, 1, 0.25]), "zx": np.float32([130, 7, 255]),
        "s1": np.float32([1]), "z1": np.float32([5]), "s2": np.float32([1]), "z2": np.float32([5]),
        "row_of": np.searchsorted([100, 500], np.arange(1000), side="right")[::1].astype(np.int64),
        "table": (noise.integers(-8, 9, (1000, 4)) * 0.5).astype(narrow),
        "spatial": np.array([2, 3]), "flat": np.array([2, 4, -1]),
    }  # fmt: skip
    lines = [
        '["step_rows/Gather"] row = Gather(row_of, timestep)',
        '["time_embedding/Gather"] emb = Gather(table, timestep)',
        '["time_emb_proj/Unsqueeze"] emb4 = Unsqueeze(emb, spatial)',
        graphs.quantize("conv.input_quantizer", "xq", "x, sx, zx, row", 0, 255),
        graphs.quantize("conv.weight_quantizer", "wcq", "wc, sw, zw", -128, 127, axis=0),
        '["conv/Conv"] h = Conv<pads: ints = [1,1,1,1]>(xq, wcq, bc)',
        '["resnet/Add"] ht = Add(h, emb4)',
        '["attn/Relu"] hr = Relu(ht)',
        '["attn/Reshape"] flatten = Reshape(hr, flat)',
        '["attn/Transpose"] tokens = Transpose<perm: ints = [0,2,1]>(flatten)',
        graphs.quantize("to_q.input_quantizer", "tq", "tokens, s1, z1", 0, 15),
        graphs.quantize("to_k.input_quantizer", "tk", "tokens, s2, z2", 0, 15),
        graphs.quantize("to_q.weight_quantizer", "wqq", "wq, s3, z3", -8, 7, axis=0),
        graphs.quantize("to_k.weight_quantizer", "wkq", "wk, s3, z3", -8, 7, axis=0),
        '["to_q/Transpose"] wqt = Transpose<perm: ints = [1,0]>(wqq)',
        '["to_k/Transpose"] wkt = Transpose<perm: ints = [1,0]>(wkq)',
        '["to_q/MatMul"] q0 = MatMul(tq, wqt)',
        '["to_q/Add"] q = Add(q0, bq)',
        '["to_k/MatMul"] k = MatMul(tk, wkt)',
        '["attn/Add"] y = Add(q, k)',
    ]
    interface = f"{body}[2,2,4,4] x, int64[1] timestep", f"{body}[2,16,3] y"
    return graphs.model_of(*interface, "\n".join(lines), constants)


@pytest.mark.parametrize("body", ["float", "float16"])
def test_all_passes_together(graphs, noise, body):
    model = network(graphs, noise, body)
    dtype = np.float16 if body == "float16" else np.float32
    x = (noise.integers(-24, 25, (2, 2, 4, 4)) * 0.125).astype(dtype)
    feeds = [{"x": x, "timestep": np.array([step])} for step in STEPS]
    before = [evaluate(model, item) for item in feeds]
    context = graphs.context_of(STEPS, body="fp16" if body == "float16" else "fp32")
    reports = run_passes(model, default_passes(), context)
    assert {report.name: report.changed for report in reports} == {
        "share-quantizers": True,
        "split-shortcut": False,
        "fold-time-embedding": True,
        "guard-labels": False,
        "expand-group-norm": False,
        "plain-attention": False,
        "sequence-first": False,
        "fold-adapters": True,
        "fold-reparam": False,
        "precompute-bos": False,
        "merge-projections": False,  # no plans, no layers
        "lower-log2": False,
        "lower-nvfp4": False,
        "lower-zero-point": True,
        "lower-timestep-scale": True,
        "sink-cast": body == "float16",
        "lower-bitwidth": True,
        "legalize-types": False,
    }
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert not any(node.domain == DOMAIN for node in proto.graph.node)
    by_name = {node.name: node for node in model.graph}
    assert {"conv/Conv", "to_q/MatMul", "to_k/MatMul"} <= set(by_name)
    quantized = by_name["to_q/MatMul"].inputs[0]
    assert quantized is by_name["to_k/MatMul"].inputs[0]  # the shared quantizer
    ours = ("step_table", "time_table", "step_rows", "conv", "to_q", "to_k", "attn", "resnet")
    assert all(name.partition("/")[0].partition(".")[0] in ours for name in by_name)
    assert not any(report.changed for report in run_passes(model, default_passes(), context))

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", 21))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for item, expected in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(evaluate(proto, item)["y"], expected["y"])
        np.testing.assert_array_equal(session.run(None, item)[0], expected["y"])
    (poisoned,) = session.run(None, {"x": x, "timestep": np.array([2])})
    assert np.isnan(poisoned).all()
