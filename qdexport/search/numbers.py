"""Whether two forms of a block compute the same: both are executed on the same random inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qdexport.check.measure import sqnr_db
from qdexport.check.session import ort_errors, reference_session
from qdexport.errors import ParityError
from qdexport.graph.edit import remove_unused, replace_value
from qdexport.graph.query import const_or_none, input_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["continuous", "difference"]

# Without quantizers and with an FP32 body two forms differ by the order of FP32 sums, about 1e-6 of a value: above 100
# dB. A wrong one is off by its own size: about 0 dB. Where a block rounds by other means than a quantizer (log2 codes),
# a tie may fall the other way; how far that goes is measured, by the exported form on inputs disturbed by as much, and
# a form may be ten decibels worse.
_ENOUGH_DB = 80.0
_DISTURBANCE = 2.0**-20
_BELOW_FLOOR_DB = 10.0
_SEED = 20240607


def difference(exported: ir.Model, other: ir.Model) -> str:
    """Why two lowered models with the same inputs and outputs do not compute the same; empty when they do.

    Their quantizers must have the same parameters, and everything else the same numbers: it is executed in FP32 without
    the quantizers of activations, so that no tie between two codes blurs the comparison.

    Args:
        exported: the form of the export.
        other: another form of the same block.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ParityError: one of them cannot be executed.
    """
    if _quantizers(exported) != _quantizers(other):
        return "it has other quantizers"
    random = np.random.default_rng(_SEED)
    feeds = _feeds(exported, random)
    before, after = (_run(continuous(model), feeds) for model in (exported, other))
    if list(before) != list(after):
        return "its outputs have other names"
    problems = _problems(before, after, dict.fromkeys(before, _ENOUGH_DB))
    if problems:  # seldom: only then is the floor worth an execution
        floor = _run(continuous(exported), {name: _disturbed(array, random) for name, array in feeds.items()})
        problems = _problems(
            before, after, {name: _sqnr(array, floor[name]) - _BELOW_FLOOR_DB for name, array in before.items()}
        )
    return problems


def _problems(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], least: Mapping[str, float]) -> str:
    for name, expected in before.items():
        found = _sqnr(expected, after[name])
        if not found >= min(least[name], _ENOUGH_DB):
            return f"it changes numbers: output {name} has an SQNR of {found:.1f} dB"
    return ""


def _sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return sqnr_db(expected.astype(np.float64), found.astype(np.float64))


def _disturbed(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    return array * (1 + _DISTURBANCE * random.uniform(-1, 1, array.shape)).astype(np.float32)


def continuous(model: ir.Model) -> ir.Model:
    """A copy in which everything of FP16 is FP32, and activations are not quantized; weights stay what they are."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            _widen(value)
    for value in copy.graph.inputs:
        _widen(value)
    for node in list(copy.graph):
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and target.as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            _widen(value)
        if node.op_type == "QuantizeLinear":
            _bypass(node)
    remove_unused(copy)
    return copy


def _bypass(node: ir.Node) -> None:
    """Lets the readers of a quantizer's codes, and of what they are restored to, read what was quantized."""
    source = input_of(node, 0)
    for use in list(node.outputs[0].uses()):
        if use.node.op_type == "DequantizeLinear":
            replace_value(use.node.outputs[0], source)
    if node.outputs[0].is_graph_output():
        replace_value(node.outputs[0], source)


def _quantizers(model: ir.Model) -> list[list[bytes]]:
    """The parameters of all quantizers of activations, sorted."""
    found = []
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            arrays = [const_or_none(value) for value in node.inputs[1:]]
            found.append([b"" if array is None else array.tobytes() for array in arrays])
    return sorted(found)


def _widen(value: ir.Value) -> None:
    if value.dtype == ir.DataType.FLOAT16:
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: copies share theirs with the original


def _feeds(model: ir.Model, random: np.random.Generator) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = [int(str(dim)) for dim in value.shape or ()]
        floating = value.dtype in {ir.DataType.FLOAT16, ir.DataType.FLOAT}
        numbers = random.standard_normal(shape, np.float32)
        feeds[value.name or ""] = numbers if floating else np.zeros(shape, value.dtype.numpy() if value.dtype else None)
    return feeds


def _run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    proto.opset_import[0].version = max(proto.opset_import[0].version, 21)
    session = reference_session(proto.SerializeToString())
    names = [value.name for value in model.graph.outputs]
    try:
        return dict(zip(map(str, names), session.run(names, dict(feeds)), strict=True))
    except ort_errors() as error:
        raise ParityError(f"ONNX Runtime cannot execute a block: {str(error).splitlines()[0]}") from error
