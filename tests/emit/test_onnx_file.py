"""Emitted files with their large constants beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdexport.check.session import reference_session
from qdexport.core.target import target_named
from qdexport.emit import onnx_file
from qdexport.emit.onnx_file import DATA_FILE, emit

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = 400  # a step table of SD 1.5 has about as many


def table_model(noise: np.random.Generator) -> ir.Model:
    """``row -> Gather(table) -> Split -> Concat of the first and the last column``."""
    nodes = [
        helper.make_node("Gather", ["table", "row"], ["gathered"], name="table/Gather"),
        helper.make_node("Split", ["gathered", "sizes"], [f"c{i}" for i in range(COLUMNS)], name="table/Split", axis=1),
        helper.make_node("Concat", ["c0", f"c{COLUMNS - 1}"], ["y"], name="table/Concat", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("row", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(noise.normal(size=(5, COLUMNS)).astype(np.float32), "table"),
            numpy_helper.from_array(np.ones(COLUMNS, np.int64), "sizes"),
        ],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_sizes_stay_in_the_file_where_shape_inference_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: np.random.Generator
) -> None:
    monkeypatch.setattr(onnx_file, "_SINGLE_FILE_BYTES", 0)
    model = table_model(noise)
    table = model.graph.initializers["table"].const_value
    assert table is not None
    file = emit(model, tmp_path / "onnx", target_named("onnxruntime"), {})
    stored = onnx.load(file.path, load_external_data=False)
    where = {item.name: item.data_location == TensorProto.EXTERNAL for item in stored.graph.initializer}
    assert where == {"table": True, "sizes": False}
    assert (file.path.parent / DATA_FILE).stat().st_size == table.nbytes
    assert file.bytes == sum(item.stat().st_size for item in file.path.parent.iterdir())
    assert model.graph.initializers["table"].const_value is table  # what was emitted is still whole in memory
    (y,) = reference_session(file.path).run(None, {"row": np.array([3])})
    np.testing.assert_array_equal(y, table.numpy()[3:4, [0, -1]])


def test_small_networks_are_one_file(tmp_path: Path, noise: np.random.Generator) -> None:
    file = emit(table_model(noise), tmp_path / "onnx", target_named("onnxruntime"), {"key": "value"})
    assert [item.name for item in file.path.parent.iterdir()] == ["model.onnx"]
    assert {item.key: item.value for item in onnx.load(file.path).metadata_props} == {"key": "value"}
