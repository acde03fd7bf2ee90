"""Replaces everything that depends on the timestep alone by one row of a table.

Before: ``timestep -> sin/cos -> Linear -> SiLU -> Linear -> SiLU -> Linear (one per resnet) -> Add``
After:  ``timestep -> Gather(row index) -> Gather(table) -> Split -> Add``

Identity: a function of ``t`` alone is its table over the timesteps that occur. The rows are evaluated in FP32 and
rounded once to the body's type. Where text or a class enters the embedding (SDXL), only the part before is tabled.
Exact up to the order of sums and roundings that fall away: a library may sum the product of one row in another order
than that of several. Where every timestep has a row, the timestep is the row.

A timestep without a row reads NaN, so that it can never pass unnoticed; since a quantizer would turn that into a code
like any other, a column that is 0 in every row is also added to the outputs of the network. A Gather would count a
negative timestep from the end: it is clipped to -1 and the number of training steps first; both read the row of NaN.

A timestep that is a float (flow matching) finds the row whose timestep it is, up to the rounding of a pipeline in half
precision (:mod:`qdexport.core.timesteps`): ``d = |rows - t| - reach, row = ArgMin(d)``, and NaN where ``min d > 0``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.core.timesteps import equal_reach, reach_of, reaches
from qdexport.errors import GraphPassError
from qdexport.graph.dialect import STEP_ROWS
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import subgraph
from qdexport.graph.query import const_or_none, dtype_of, module_of, shape_of, value_name
from qdexport.graph.rows import evaluate_rows
from qdexport.passes.guard_outputs import guard_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.core.io_spec import IoSpec
    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["FoldTimeEmbedding", "time_columns"]

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
_MODULE = "time_table"


class FoldTimeEmbedding:
    """Tables the float values that depend on the timestep alone; leaves the graph alone when the recipe keeps them."""

    name: ClassVar[str] = "fold-time-embedding"
    exact: ClassVar[bool] = True
    up_to: ClassVar[str] = "the order of sums and roundings that fall away"
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
        _check_range(context, timestep)
        table = evaluate_rows(_in_float32(subgraph(model, [timestep], frontier)), context.timesteps)
        report.touched.extend(sorted({module_of(node) for value in frontier if (node := value.producer())}))
        guard_outputs(model, _write_table(timestep, frontier, table, context), _MODULE)
        remove_unused(model)


def time_columns(model: ir.Model, io: IoSpec) -> int:
    """How many numbers of the network depend on the timestep alone: the columns of the table. The graph is untouched.

    Raises:
        GraphPassError: they cannot become a table.
    """
    spec = io.by_role("timestep")
    timestep = next((value for value in model.graph.inputs if spec is not None and value.name == spec.name), None)
    if timestep is None:
        return 0
    repeated = [node.outputs[0] for node in _repeats(timestep)]
    return sum(_size(list(shape_of(value))[1:]) for value in _frontier(model, timestep, repeated))


def _is_tabled(value: ir.Value) -> bool:
    """Whether a value comes out of the table already, so that a second run has nothing to do."""
    producer = value.producer()
    return producer is not None and module_of(producer) == _MODULE


def _check_range(context: PassContext, timestep: ir.Value) -> None:
    """Refuses rows that no call could mean, or that two calls could."""
    last, steps = context.training_steps - 1, sorted(context.timesteps or ())
    if timestep.dtype != ir.DataType.FLOAT:
        for step in steps:
            if not 0 <= step <= last:
                raise GraphPassError(f"timestep {step} is outside 0..{last}; use the model's own schedule")
            if not float(step).is_integer():
                raise GraphPassError(f"timestep {step} is a fraction, and the network's timestep is an integer")
        return
    reach = [reach_of(step, context.timestep_rounding) for step in steps]
    for (low, low_reach), (high, high_reach) in pairwise(zip(steps, reach, strict=True)):
        if high - low <= max(low_reach + high_reach, equal_reach(steps)):
            raise GraphPassError(
                f"timesteps {low} and {high} are too near to be told apart once a pipeline has rounded them; "
                "sample in fewer steps, or say `time_embedding: keep`"
            )


def _bypass_expand(model: ir.Model, timestep: ir.Value) -> None:
    """One timestep for the whole batch stays one row: what reads it adds it by broadcasting.

    diffusers repeats it by ``expand`` in UNet2DConditionModel, and by a product with ones in UNet2DModel.
    """
    if len(shape_of(timestep)) != 1 or shape_of(timestep)[0] != 1:
        return
    for node in _repeats(timestep):
        replace_value(node.outputs[0], timestep)
    remove_unused(model)  # the shape that a bypassed Expand computed from the batch
    _keep_one_row(model, timestep)


def _repeats(timestep: ir.Value) -> list[ir.Node]:
    """The nodes that repeat the timestep for every row of the batch."""
    return [
        use.node
        for use in timestep.uses()
        if (use.node.op_type == "Expand" and use.idx == 0)
        or (use.node.op_type == "Mul" and _is_ones(use.node.inputs[1 - use.idx]))
    ]


def _keep_one_row(model: ir.Model, timestep: ir.Value) -> None:
    """Lets a Reshape of something with one row give one row too, where it was written for the batch (PixArt)."""
    alone: set[ir.Value] = {timestep}
    fixed: set[ir.Value] = set()  # computed from constants alone: weights behind their quantizers
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        sources = [value for value in inputs if value not in fixed and const_or_none(value) is None]
        if node.op_type == "Reshape" and inputs[0] in alone:
            _reshape_to_one_row(node)
            sources = inputs[:1]
        if not sources:
            fixed.update(node.outputs)
        elif all(value in alone for value in sources):
            alone.update(node.outputs)


def _reshape_to_one_row(node: ir.Node) -> None:
    before, dims = list(shape_of(node.inputs[0] or node.outputs[0])), list(shape_of(node.outputs[0]))
    if len(dims) < 3 or dims[0] == 1 or not all(isinstance(dim, int) for dim in [*before[1:], *dims[1:]]):
        return
    if _size(before[1:]) != _size(dims[1:]):
        return  # it moves other axes, not rows
    target = np.array([-1, *(int(str(dim)) for dim in dims[1:])], np.int64)
    node.replace_input_with(1, NodeWriter(node).constant("one_row", target))
    node.outputs[0].shape = ir.Shape([1, *dims[1:]])


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


def _frontier(model: ir.Model, timestep: ir.Value, repeated: Sequence[ir.Value] = ()) -> list[ir.Value]:
    """The float values that depend on the timestep alone and are read by something that does not.

    ``repeated`` are the timestep once more, for every row of the batch.
    """
    alone: dict[ir.Value, None] = dict.fromkeys([timestep, *repeated])
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
        if (value is timestep or value in repeated) and readers:
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


def _row(writer: NodeWriter, timestep: ir.Value, context: PassContext) -> ir.Value:
    """The row of the running call, INT64 of the timestep's shape; that behind the last where there is none."""
    steps = list(context.timesteps or ())
    if timestep.dtype != ir.DataType.FLOAT:
        return _row_of_whole(writer, timestep, np.array(steps), context.training_steps)
    count = shape_of(timestep)[0]
    rows, reach = np.array(steps, np.float32), np.array(reaches(steps, context.timestep_rounding), np.float32)
    shape = [count, len(steps)]
    column = timestep
    if count != 1:
        target = writer.constant("column", np.array([-1, 1], np.int64))
        column = writer.op("Reshape", [timestep, target], dtype=ir.DataType.FLOAT, shape=[count, 1])
    options: dict[str, Any] = {"dtype": ir.DataType.FLOAT, "shape": shape}
    distance = writer.op("Sub", [writer.constant("timesteps", rows[None]), column], **options)
    size = writer.op("Abs", [distance], **options)
    beyond = writer.op("Sub", [size, writer.constant("reach", reach[None])], **options)
    nearest = writer.op("ArgMin", [beyond], {"axis": 1, "keepdims": 0}, dtype=ir.DataType.INT64, shape=[count])
    axes = writer.constant("axes", np.array([1], np.int64))
    least = writer.op("ReduceMin", [beyond, axes], {"keepdims": 0}, dtype=ir.DataType.FLOAT, shape=[count])
    zero = writer.constant("zero", np.float32(0))
    found = writer.op("LessOrEqual", [least, zero], dtype=ir.DataType.BOOL, shape=[count])  # false for NaN
    none = writer.constant("no_row", np.array([len(steps)], np.int64))
    return writer.op("Where", [found, nearest, none], dtype=ir.DataType.INT64, shape=[count])


def _row_of_whole(writer: NodeWriter, timestep: ir.Value, steps: np.ndarray, training_steps: int) -> ir.Value:
    """The row of a whole timestep. Beyond both ends a Gather would take a row from the other end, or stop."""
    first, last = (np.array([end], np.int64) for end in (-1, training_steps))  # both are the last row
    # parsers take no Clip of integers
    inside = writer.op("Max", [timestep, writer.constant("first", first)], like=timestep)
    inside = writer.op("Min", [inside, writer.constant("last", last)], like=timestep)
    if np.array_equal(steps, np.arange(training_steps)):
        return inside
    index = np.full(training_steps + 1, len(steps), np.int64)
    index[steps] = np.arange(len(steps))
    return writer.op("Gather", [writer.constant("row_of_timestep", index), inside], like=timestep)


def _write_table(timestep: ir.Value, frontier: Sequence[ir.Value], table: np.ndarray, context: PassContext) -> ir.Value:
    """Lets the table make all values of the frontier; returns the column that is 0 where there is a row, else NaN."""
    first = next(node for node in frontier[0].graph or () if any(value in frontier for value in node.outputs))
    writer = NodeWriter(first, _MODULE)
    types = {dtype_of(value) for value in frontier}
    body = types.pop() if len(types) == 1 else ir.DataType.FLOAT
    row = _row(writer, timestep, context)
    table = np.concatenate([table, np.zeros((len(table), 1), np.float32)], axis=1)
    poisoned = np.concatenate([table, np.full((1, table.shape[1]), np.nan, np.float32)]).astype(body.numpy())
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
