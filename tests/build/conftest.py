"""Small Q/DQ networks in the portable typed form, and a way to build them."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.core.io_spec import IoSpec
from qdexport.core.target import TARGETS

FLOATS = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}


class Net:
    """An ONNX graph under construction; every method returns the name of the tensor it made."""

    def __init__(self, body="fp16"):
        self.body, self.nodes, self.initializers, self.inputs = body, [], [], []
        self.random = np.random.default_rng(0)

    def input(self, name, dims, dtype=None):
        self.inputs.append(helper.make_tensor_value_info(name, dtype or FLOATS[self.body], dims))
        return name

    def constant(self, name, array):
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def floats(self, name, shape):
        dtype = np.float16 if self.body == "fp16" else np.float32
        return self.constant(name, self.random.normal(size=shape).astype(dtype))

    def int4(self, name, shape, dtype=TensorProto.INT4):
        low = 0 if dtype == TensorProto.UINT4 else -7
        codes = self.random.integers(low, 8, shape).flatten().tolist()
        self.initializers.append(helper.make_tensor(name, dtype, shape, codes))
        return name

    def node(self, name, op, inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [name + ".out"], name=name, **attributes))
        return name + ".out"

    def cast(self, name, x, to):
        return self.node(name, "Cast", [x], to=to) if self.body == "fp16" else x

    def quantize(self, layer, x, scale=0.05, zero_point=0):
        """Cast, Q, DQ, Cast; a string as scale is a tensor."""
        q = layer + ".input_quantizer"
        if not isinstance(scale, str):
            scale = self.constant(q + ".scale", np.float32(scale))
        zero = self.constant(q + ".zero_point", np.int8(zero_point))
        x = self.cast(q + "/Cast", x, TensorProto.FLOAT)
        x = self.node(q + "/QuantizeLinear", "QuantizeLinear", [x, scale, zero])
        x = self.node(q + "/DequantizeLinear", "DequantizeLinear", [x, scale, zero])
        return self.cast(q + "/Cast_1", x, TensorProto.FLOAT16)

    def weight(self, layer, shape, axis):
        q = layer + ".weight_quantizer"
        codes = self.constant(q + ".codes", self.random.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(q + ".scale", self.random.uniform(1e-3, 2e-3, shape[axis]).astype(np.float32))
        zero = self.constant(q + ".zero_point", np.zeros(shape[axis], np.int8))
        x = self.node(q + "/DequantizeLinear", "DequantizeLinear", [codes, scale, zero], axis=axis)
        return self.cast(q + "/Cast", x, TensorProto.FLOAT16)

    def conv(self, layer, x, shape, **quantizer):
        x = self.quantize(layer, x, **quantizer)
        inputs = [x, self.weight(layer, shape, 0), self.floats(layer + ".bias", shape[0])]
        return self.node(layer + "/Conv", "Conv", inputs, pads=[shape[-1] // 2] * 4)

    def linear(self, layer, x, shape):
        """``shape`` is [in, out]; the activation must be quantized by the caller."""
        y = self.node(layer + "/MatMul", "MatMul", [x, self.weight(layer, shape, 1)])
        return self.node(layer + "/Add", "Add", [y, self.floats(layer + ".bias", shape[1])])

    def float_linear(self, layer, x, shape):
        return self.node(layer + "/MatMul", "MatMul", [x, self.floats(layer + ".weight", shape)])

    def save(self, path, output, dtype=None):
        outputs = [helper.make_tensor_value_info(output, dtype or FLOATS[self.body], None)]
        graph = helper.make_graph(self.nodes, "net", self.inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qdexport", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


CONV = "down_blocks.0.resnets.0.conv1"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"


def conv_linear_net(path, body="fp16", dims=(2, 32, 16, 16)):
    """A quantized convolution, SiLU, a quantized linear layer, and one that stays in floating point."""
    net = Net(body)
    x = net.input("sample", list(dims))
    x = net.conv(CONV, x, (32, 32, 3, 3))
    x = net.node("act/Mul", "Mul", [x, net.node("act/Sigmoid", "Sigmoid", [x])])
    x = net.node("flat/Reshape", "Reshape", [x, net.constant("shape", np.array([0, 32, -1]))])
    x = net.node("flat/Transpose", "Transpose", [x], perm=[0, 2, 1])
    x = net.linear(LINEAR, net.quantize(LINEAR, x), (32, 64))
    return net.save(path, net.float_linear("proj_out", x, (64, 48)))


def options(target="tensorrt-rtx", capabilities=(), inputs=(), profiles=(), timeout_s=None, **changes):
    row = dataclasses.replace(TARGETS[target], **changes)
    io = IoSpec(inputs=tuple(inputs), outputs=(), profiles=tuple(profiles))
    return BuildOptions(target=row, io=io, compute_capabilities=capabilities, timeout_s=timeout_s)


@pytest.fixture
def nets():
    """This module's helpers: test files cannot import it by name."""
    return _Helpers


@pytest.fixture
def rtx():
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs the tensorrt_rtx package")


@pytest.fixture
def build(rtx, tmp_path):
    """Builds an ONNX file for one compute capability."""

    def run(path: Path, capabilities=("8.9",), **changes):
        return build_engine(path, tmp_path / "engine", options(capabilities=capabilities, **changes))

    return run


@pytest.fixture
def fake_builder(tmp_path, monkeypatch):
    """Makes a builder package from source text, for this process and its children."""

    def make(name: str, source: str) -> str:
        folder = tmp_path / "packages"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.syspath_prepend(folder)
        return name

    return make


class _Helpers:
    Net, CONV, LINEAR = Net, CONV, LINEAR
    conv_linear_net, options = staticmethod(conv_linear_net), staticmethod(options)
