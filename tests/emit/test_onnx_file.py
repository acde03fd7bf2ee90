"""Emitted files with their large constants beside them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdexport.check.session import reference_session
from qdexport.core.target import target_named
from qdexport.emit import onnx_file
from qdexport.emit.external import write_external
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


def test_the_data_file_has_no_gaps_and_no_copies(tmp_path: Path, noise: np.random.Generator) -> None:
    arrays = {
        "codes": noise.integers(-9, 9, (3, 1 << 20)).astype(np.int8),  # more than a page, and no multiple of one
        "halves": noise.normal(size=301).astype(np.float16),
        "again": np.zeros(0, np.float16),
        "scales": noise.normal(size=77).astype(np.float32),
        "flags": noise.integers(-8, 8, 999).astype(np.int8),
    }
    arrays["again"] = arrays["halves"].copy()
    values = {
        name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()
    }
    four_bits = ir.tensor(noise.integers(-8, 8, 64).astype(ir.DataType.INT4.numpy()), name="nibbles")
    values["nibbles"] = ir.Value(name="nibbles", const_value=four_bits)
    stored = write_external(values.values(), tmp_path, DATA_FILE)
    once = sum(array.nbytes for name, array in arrays.items() if name != "again")
    assert (tmp_path / DATA_FILE).stat().st_size == once + 32
    for name, array in arrays.items():
        tensor = stored[values[name]]
        assert tensor.offset is not None
        assert tensor.offset % array.itemsize == 0
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)
    np.testing.assert_array_equal(stored[values["nibbles"]].numpy(), four_bits.numpy())


MEASURE = """
import sys, numpy as np, onnx_ir as ir
from pathlib import Path
from qdexport.build.child import peak_rss_mb
from qdexport.core.target import target_named
from qdexport.emit.onnx_file import emit
codes = [np.full((16 << 20,), part, np.int8) for part in range(6)]
x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT8))
graph, last = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), x
for index, array in enumerate(codes):
    tensor = ir.tensor(array, name=f"c{index}")
    part = ir.Value(name=f"c{index}", shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(part)
    node = ir.node("Concat", [last, part], {"axis": 0}, name=f"n{index}/Concat")
    graph.append(node)
    last = node.outputs[0]
last.name, last.type, last.shape = "y", ir.TensorType(ir.DataType.INT8), ir.Shape([1 + (96 << 20)])
graph.outputs.append(last)
before = peak_rss_mb()
emit(ir.Model(graph, ir_version=10), Path(sys.argv[1]), target_named("onnxruntime"), {})
print(peak_rss_mb() - before)
"""


def test_writing_takes_the_memory_of_single_tensors(tmp_path: Path) -> None:
    """96 MiB in six tensors of 16 MiB: two copies of one are 32 MiB; a file made in memory would be three times 96."""
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "onnx")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64
    assert (tmp_path / "onnx" / DATA_FILE).stat().st_size == 96 << 20
