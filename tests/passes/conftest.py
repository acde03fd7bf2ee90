"""Small graphs in ONNX text, and the harness that every pass runs in.

A node's name in the text, ``["conv/Conv"]``, also says its torch module: the part before the last slash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.core.target import TARGETS
from qdexport.graph.dialect import DOMAIN, LAYER_KEY, register_schema
from qdexport.graph.evaluate import evaluate, subgraph
from qdexport.graph.runner import GraphPass, PassContext, PassReport, run_passes

Arrays = Mapping[str, np.ndarray]
EPS = 2.0**-24  # half a unit in the last place of 1.0 in FP32
TRAINING_STEPS = 1000


def model_of(inputs: str, outputs: str, body: str, constants: Arrays) -> ir.Model:
    """A model from ONNX text and named arrays; every value has its type and shape, as after a capture."""
    register_schema()
    header = f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>'
    proto = onnx.parser.parse_model(f"{header}\ng ({inputs}) => ({outputs}) {{\n{body}\n}}")
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()
    )
    model = ir.from_proto(_typed(proto))
    for node in model.graph:
        if node.name and "/" in node.name:
            node.metadata_props[LAYER_KEY] = node.name.rpartition("/")[0]
    return model


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(proto)
    for node in stand_in.graph.node:
        if node.domain == DOMAIN:  # onnx knows no shape function of ours: the output is like the first input
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(stand_in, check_type=True, strict_mode=True, data_prop=True)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inferred.graph.value_info)
    return proto


def quantize(
    module: str, out: str, operands: str, qmin: int, qmax: int, axis: int = -1, form: str = ""
) -> str:
    """The line of a FakeQuantize node."""
    attributes = f"qmin: int = {qmin}, qmax: int = {qmax}, axis: int = {axis}"
    if form:
        attributes += f', form: string = "{form}"'
    return f'["{module}/FakeQuantize"] {out} = {DOMAIN}.FakeQuantize<{attributes}>({operands})'


def weight_of(module: str, out: str, axis: int = 0) -> str:
    """The line that dequantizes ``{out}_codes`` with ``{out}_scale`` and ``{out}_zero``."""
    return (
        f'["{module}.weight_quantizer/DequantizeLinear"] {out} = '
        f"DequantizeLinear<axis: int = {axis}>({out}_codes, {out}_scale, {out}_zero)"
    )


def weight_constants(out: str, codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """The constants of :func:`weight_of`."""
    return {
        f"{out}_codes": codes.astype(np.int8),
        f"{out}_scale": scale.astype(np.float32),
        f"{out}_zero": np.zeros(scale.shape, np.int8),
    }


def context_of(
    timesteps: tuple[int, ...] | None = None, *, timestep_input: bool = True, body: str = "fp32"
) -> PassContext:
    """Facts for passes; the network has an INT64 ``timestep`` unless told otherwise."""
    one = Dim(low=1, best=1, high=1)
    timestep = TensorSpec(name="timestep", role="timestep", dtype="int64", dims=(one,))
    return PassContext(
        target=TARGETS["tensorrt-rtx"],
        body="fp16" if body == "fp16" else "fp32",
        io=IoSpec(inputs=(timestep,) if timestep_input else (), outputs=()),
        layers=(),
        timesteps=timesteps,
        training_steps=TRAINING_STEPS,
    )


@dataclass
class Ran:
    """A pass has run: the model, its report, and outputs of all feeds before and after."""

    model: ir.Model
    report: PassReport
    before: list[dict[str, np.ndarray]]
    after: list[dict[str, np.ndarray]]
    original: onnx.ModelProto = field(repr=False)

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph]

    def node(self, name: str) -> ir.Node:
        return next(node for node in self.model.graph if node.name == name)

    def nodes(self, op_type: str) -> list[ir.Node]:
        return [node for node in self.model.graph if node.op_type == op_type]

    def at(self, name: str, feeds: Arrays) -> np.ndarray:
        """The first output of a node of the rewritten model."""
        value = self.node(name).outputs[0]
        inputs = list(self.model.graph.inputs)
        return next(iter(evaluate(subgraph(self.model, inputs, [value]), feeds).values()))

    def before_at(self, name: str, feeds: Arrays) -> np.ndarray:
        """The first output of a node of the original model."""
        model = ir.from_proto(self.original)
        value = next(node for node in model.graph if node.name == name).outputs[0]
        return next(iter(evaluate(subgraph(model, list(model.graph.inputs), [value]), feeds).values()))

    def assert_equal(self) -> None:
        """Every output of every feed is equal, bit for bit."""
        for before, after in zip(self.before, self.after, strict=True):
            for name, array in before.items():
                np.testing.assert_array_equal(after[name], array, strict=True)

    def assert_close_to_rows(self) -> None:
        """A table's rows are evaluated together, the network's one by one: BLAS may sum them in another order."""
        self.assert_close(terms=16, magnitude=8.0)

    def assert_close(self, terms: int, magnitude: float) -> None:
        """Equal but for the order of FP32 sums: each form is off by at most one rounding per operation, of
        numbers no larger than the sum of the magnitudes of its terms (Higham 2002, section 3.1).
        """
        for before, after in zip(self.before, self.after, strict=True):
            for name, array in before.items():
                np.testing.assert_allclose(after[name], array, rtol=0, atol=2 * (terms + 6) * EPS * magnitude)


def run(
    model: ir.Model, graph_pass: GraphPass, feeds: Arrays | list[Arrays], context: PassContext | None = None
) -> Ran:
    """Runs a pass, and asserts what holds for all: interface kept, legal ONNX, second run changes nothing."""
    register_schema()
    context = context or context_of()
    every = feeds if isinstance(feeds, list) else [feeds]
    original = onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString())
    before = [evaluate(original, item) for item in every]
    (report,) = run_passes(model, [graph_pass], context)
    first = ir.to_proto(model)
    onnx.checker.check_model(first, full_check=True)
    for kind in ("input", "output"):
        old, new = getattr(original.graph, kind), getattr(first.graph, kind)
        assert [(item.name, item.type) for item in new] == [(item.name, item.type) for item in old]
    names = [node.name for node in first.graph.node]
    assert len(set(names)) == len(names)
    text = first.SerializeToString(deterministic=True)
    (again,) = run_passes(model, [graph_pass], context)
    assert not again.changed
    assert ir.to_proto(model).SerializeToString(deterministic=True) == text
    after = [evaluate(first, item) for item in every]
    return Ran(model=model, report=report, before=before, after=after, original=original)


class Harness:
    """This module's functions: test files cannot import it by name."""

    model_of = staticmethod(model_of)
    quantize = staticmethod(quantize)
    weight_of = staticmethod(weight_of)
    weight_constants = staticmethod(weight_constants)
    context_of = staticmethod(context_of)
    run: Callable[..., Ran] = staticmethod(run)


@pytest.fixture(scope="session")
def graphs() -> type[Harness]:
    return Harness
