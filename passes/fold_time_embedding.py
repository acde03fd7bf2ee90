"""Replaces everything that depends on the timestep alone by one row of a table.

Before: ``timestep -> sin/cos -> Linear -> SiLU -> Linear -> SiLU -> Linear (one per resnet) -> Add``
After:  ``timestep -> Gather(row index) -> Gather(table) -> Split -> Add``

Identity: a function of ``t`` alone is its table over the timesteps that occur. The rows are evaluated in FP32 and
rounded once to the body's type. Where text or a class enters the embedding (SDXL), only the part before is tabled.
Exact up to that rounding. A timestep without a row reads NaN, so that it can never pass unnoticed; since a quantizer
would turn that into a code like any other, a column that is 0 in every row is also added to the outputs of the network.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import STEP_ROWS
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import evaluator, subgraph
from qdexport.graph.query import const_or_none, dtype_of, module_of, shape_of, value_name
from qdexport.passes.guard_outputs import guard_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldTimeEmbedding"]

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
_MODULE = "time_table"


class FoldTimeEmbedding:
    """Tables the float values that depend on the timestep alone; leaves the graph alone when the recipe keeps them."""

    name: ClassVar[str] = "fold-time-embedding"
    exact: ClassVar[bool] = True
    runs_after: ClassVar[tuple[str, ...]] = ()

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        spec = context.io.by_role("timestep")
        if context.timesteps is None or spec is None:
            return
        timestep = next(value for value in model.graph.inputs if value.name == spec.name)
        _bypass_expand(model, timestep)
        frontier = _frontier(model, timestep)
        if all(_is_tabled(value) for value in frontier):
            return
        _check_range(context)
        table = _evaluate_rows(model, timestep, frontier, context.timesteps)
        report.touched.extend(sorted({module_of(node) for value in frontier if (node := value.producer())}))
        guard_outputs(model, _write_table(timestep, frontier, table, context), _MODULE)
        remove_unused(model)


def _is_tabled(value: ir.Value) -> bool:
    """Whether a value comes out of the table already, so that a second run has nothing to do."""
    producer = value.producer()
    return producer is not None and module_of(producer) == _MODULE


def _check_range(context: PassContext) -> None:
    for step in context.timesteps or ():
        if not 0 <= step < context.training_steps:
            raise GraphPassError(
                f"timestep {step} is outside 0..{context.training_steps - 1}; use the model's own schedule"
            )


def _bypass_expand(model: ir.Model, timestep: ir.Value) -> None:
    """One timestep for the whole batch stays one row: what reads it adds it by broadcasting.

    diffusers repeats it by ``expand`` in UNet2DConditionModel, and by a product with ones in UNet2DModel.
    """
    if len(shape_of(timestep)) != 1 or shape_of(timestep)[0] != 1:
        return
    for use in list(timestep.uses()):
        node = use.node
        repeats = node.op_type == "Expand" and use.idx == 0
        if repeats or (node.op_type == "Mul" and _is_ones(node.inputs[1 - use.idx])):
            replace_value(node.outputs[0], timestep)
    remove_unused(model)  # the shape that a bypassed Expand computed from the batch


def _is_ones(value: ir.Value | None) -> bool:
    """Whether a value is 1 everywhere: a constant, or a constant spread over a computed shape."""
    array = const_or_none(value)
    if array is not None:
        return bool((array == 1).all())
    producer = None if value is None else value.producer()
    if producer is None:
        return False
    if producer.op_type == "ConstantOfShape":
        fill = producer.attributes.get("value")
        return fill is not None and bool((fill.as_tensor().numpy() == 1).all())
    return producer.op_type in {"Expand", "Cast"} and _is_ones(producer.inputs[0])


def _frontier(model: ir.Model, timestep: ir.Value) -> list[ir.Value]:
    """The float values that depend on the timestep alone and are read by something that does not."""
    alone: dict[ir.Value, None] = {timestep: None}
    fixed: set[ir.Value] = set()  # computed from constants alone: weights behind their quantizers, frequencies
    for node in model.graph:
        if module_of(node) == STEP_ROWS:
            continue  # the row lookup of the activation scales has a pass of its own
        inputs = [value for value in node.inputs if value is not None]
        sources = [value for value in inputs if value not in fixed and const_or_none(value) is None]
        if not sources:
            fixed.update(node.outputs)
        elif all(value in alone for value in sources):
            alone.update(dict.fromkeys(node.outputs))
    frontier = []
    for value in alone:
        readers = [use.node for use in value.uses() if not all(out in alone for out in use.node.outputs)]
        readers = [node for node in readers if module_of(node) != STEP_ROWS]
        if value is timestep and readers:
            raise GraphPassError(
                f"{readers[0].name} reads the raw timestep beside other inputs; say `time_embedding: keep` "
                "in the recipe"
            )
        if readers or value.is_graph_output():
            _check_broadcast(value, readers)
            frontier.append(value)
    return frontier


def _check_broadcast(value: ir.Value, readers: Sequence[ir.Node]) -> None:
    wrong = [node.name for node in readers if node.op_type not in _BROADCASTING]
    if wrong:
        raise GraphPassError(
            f"{value_name(value)} depends on the timestep alone, but {wrong[0]} does not broadcast it over the batch; "
            "say `time_embedding: keep` in the recipe"
        )


def _evaluate_rows(
    model: ir.Model, timestep: ir.Value, frontier: Sequence[ir.Value], steps: Sequence[int]
) -> np.ndarray:
    """The frontier's values at every timestep, flattened: FP32 ``[steps, columns]``."""
    run = evaluator(_in_float32(subgraph(model, [timestep], frontier)))
    rows = []
    for step in steps:
        results = run({value_name(timestep): np.array([step], np.int64)})
        rows.append(np.concatenate([np.asarray(results[value_name(v)], np.float32).ravel() for v in frontier]))
    return np.stack(rows)


def _in_float32(model: ir.Model) -> ir.Model:
    """The same small graph with FP16 constants and casts widened, so that sums are FP32."""
    half = ir.DataType.FLOAT16
    for value in model.graph.initializers.values():
        array = const_or_none(value)
        if array is not None and value.dtype == half:
            value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for out in node.outputs:
            if out.dtype == half:
                out.type = ir.TensorType(ir.DataType.FLOAT)  # a new object: clones share theirs with the source
    return model


def _size(dims: Sequence[int | ir.SymbolicDim]) -> int:
    """The number of elements; the dimensions of a row of the table are known."""
    return math.prod(int(str(dim)) for dim in dims)


def _write_table(timestep: ir.Value, frontier: Sequence[ir.Value], table: np.ndarray, context: PassContext) -> ir.Value:
    """Lets the table make all values of the frontier; returns the column that is 0 where there is a row, else NaN."""
    first = next(node for node in frontier[0].graph or () if any(value in frontier for value in node.outputs))
    writer = NodeWriter(first, _MODULE)
    types = {dtype_of(value) for value in frontier}
    body = types.pop() if len(types) == 1 else ir.DataType.FLOAT
    index = np.full(context.training_steps, len(table), np.int64)
    index[np.array(context.timesteps)] = np.arange(len(table))
    table = np.concatenate([table, np.zeros((len(table), 1), np.float32)], axis=1)
    poisoned = np.concatenate([table, np.full((1, table.shape[1]), np.nan, np.float32)]).astype(body.numpy())
    row = writer.op("Gather", [writer.constant("row_of_timestep", index), timestep], like=timestep)
    count = shape_of(timestep)[0]
    values = writer.op("Gather", [writer.constant("rows", poisoned), row], dtype=body, shape=[count, table.shape[1]])
    shapes = [[count, *list(shape_of(value))[1:]] for value in frontier]
    widths = [*(_size(shape[1:]) for shape in shapes), 1]
    sizes = writer.constant("widths", np.array(widths, np.int64))
    *parts, guard = writer.many("Split", [values, sizes], {"axis": 1}, [[count, width] for width in widths])
    for value, part, shape in zip(frontier, parts, shapes, strict=True):
        if len(shape) != 2:
            target = writer.constant("shape", np.array([-1, *shape[1:]], np.int64))
            part = writer.op("Reshape", [part, target], dtype=body, shape=shape)  # noqa: PLW2901 the same value, reshaped
        replace_value(value, writer.cast(part, dtype_of(value)))
    return guard
