"""Graphs in ONNX text, and a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.target import TARGETS
from qdexport.graph.dialect import DOMAIN, LAYER_KEY, register_schema
from qdexport.graph.runner import PassContext
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.tiny import save_tiny_pipeline

MakeGraph = Callable[[str, str, str, Mapping[str, np.ndarray]], ir.Model]
MakeContext = Callable[..., PassContext]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sd", "sd")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder)


def _make_graph(inputs: str, outputs: str, body: str, constants: Mapping[str, np.ndarray]) -> ir.Model:
    register_schema()
    header = f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>'
    proto = onnx.parser.parse_model(f"{header}\ng ({inputs}) => ({outputs}) {{\n{body}\n}}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(proto)
    for node in stand_in.graph.node:
        if node.domain == DOMAIN:  # onnx has no shape function for it; its output is like its first input
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(stand_in, check_type=True, strict_mode=True, data_prop=True)
    proto.graph.value_info.extend(inferred.graph.value_info)
    model = ir.from_proto(proto)
    for node in model.graph:
        if node.name and "/" in node.name:
            node.metadata_props[LAYER_KEY] = node.name.rpartition("/")[0]
    return model


@pytest.fixture
def make_graph() -> MakeGraph:
    """``make_graph(inputs, outputs, body, constants)``; a node's name also says its module."""
    return _make_graph


def _make_context(timesteps: tuple[int, ...] | None = None, bos: np.ndarray | None = None) -> PassContext:
    one = Dim(low=1, best=1, high=1)
    timestep = TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(one,))
    return PassContext(
        target=TARGETS["tensorrt-rtx"],
        body="fp32",
        io=IoSpec(inputs=(timestep,) if timesteps else (), outputs=()),
        layers=(),
        timesteps=timesteps,
        training_steps=1000,
        bos=bos,
    )


@pytest.fixture
def make_context() -> MakeContext:
    """Facts for passes."""
    return _make_context
