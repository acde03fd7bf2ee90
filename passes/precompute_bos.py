"""Looks keys and values of the text's first token up, instead of computing them (MixDQ's BOS constant).

Before: ``x -> Slice(token 0) -> L.first_token/MatMul [-> Add]`` for every layer L, in floating point
After:  ``x -> Slice(token 0) -> kind[N] -> Gather(table[3, sum of C]) -> Split -> Unsqueeze`` for all layers at once

A causal text encoder gives the first token the same embedding for every prompt, so that its projections are constants.
Each row of the batch is judged in the graph: kind 0 is that embedding, kind 1 a zero token (pipelines zero negative
prompts; its projection is the bias), kind 2 anything else, which reads NaN. Since a quantizer would turn that into a
code like any other, a column that is 0 for the first two kinds is also added to the outputs of the network. Constants
are computed in FP64 and rounded once to the body's type. How many tokens there are does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qdexport.errors import GraphPassError
from qdexport.graph.edit import NodeWriter, remove_unused, replace_value
from qdexport.graph.evaluate import constant_expression
from qdexport.graph.query import (
    COMPUTE_OPS,
    const_or_none,
    dtype_of,
    input_of,
    module_of,
    only_consumer,
    shape_of,
)
from qdexport.passes.guard_outputs import guard_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.graph.runner import PassContext, PassReport

__all__ = ["PrecomputeBos"]

_MODULE = "bos_table"
_SUFFIX = ".first_token"
# An embedding counts as the stored one up to a distance of 1 % of its norm. The same encoder in FP16 is off by about
# 1e-3 (2^-11 per operation, some tens of layers deep, mostly cancelling), on another device by less; another token, or
# another encoder, has a distance of the order of the norm itself.
_SAME_SQUARED = 1e-4


@dataclass(frozen=True, slots=True)
class _Projection:
    """The first token's part of one layer: ``out = token W + b``, and its values for the three kinds, ``[3, C]``."""

    layer: str
    node: ir.Node
    token: ir.Value
    out: ir.Value
    rows: np.ndarray


class PrecomputeBos:
    """Replaces every projection in a module ``L.first_token``; layers that read one tensor share one lookup."""

    name: ClassVar[str] = "precompute-bos"
    exact: ClassVar[bool] = False
    # Before or after fold-adapters: that pass turns the same weight into codes and leaves it to other readers.
    # fold-reparam scales the projection itself, not what is read out of the table.
    runs_after: ClassVar[tuple[str, ...]] = ("fold-reparam",)

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
        by_text: dict[ir.Value, list[_Projection]] = {}
        for node in list(model.graph):
            if node.op_type in COMPUTE_OPS and module_of(node).endswith(_SUFFIX):
                token = _token(node)
                text = input_of(_slice_of(node, token), 0)
                by_text.setdefault(text, []).append(_projection(model, node, token, context.bos))
        for projections in by_text.values():
            if context.bos is not None:
                guard = _write_lookup(projections, context.bos)
                guard_outputs(model, guard, _MODULE)
                report.touched.extend(item.layer for item in projections)
        if report.touched:
            remove_unused(model)


def _layer(node: ir.Node) -> str:
    return module_of(node).removesuffix(_SUFFIX)


def _token(node: ir.Node) -> ir.Value:
    """What the projection reads: ``[N, 1, D]``."""
    token = input_of(node, 0)
    if node.op_type != "MatMul" or len(shape_of(token)) != 3:
        raise GraphPassError(
            f"{_layer(node)}: the first token's projection is a {node.op_type} of shape {token.shape}, not a MatMul of "
            "[batch, 1, width]; capture the model again, or set `bos: off`"
        )
    return token


def _slice_of(node: ir.Node, token: ir.Value) -> ir.Node:
    """The Slice that takes token 0 out of the text."""
    producer = token.producer()
    if producer is not None and producer.op_type == "Slice":
        bounds = [const_or_none(item) for item in producer.inputs[1:4]]
        if [None if item is None else item.tolist() for item in bounds] == [[0], [1], [1]]:
            return producer
    source = "a network input" if producer is None else str(producer.name)
    raise GraphPassError(
        f"{_layer(node)}: the first token's projection reads {source}, not the first token of the text; capture the "
        "model again, or set `bos: off`"
    )


def _projection(model: ir.Model, node: ir.Node, token: ir.Value, bos: np.ndarray | None) -> _Projection:
    layer = _layer(node)
    if bos is None:
        raise GraphPassError(
            f"{layer} treats the first token of the text apart, but its embedding is not known; quantize the model "
            "with `bos: constant`, from a pipeline with its text encoder"
        )
    weight = constant_expression(model, input_of(node, 1))
    if weight is None:
        raise GraphPassError(f"{layer}: the weight of the first token's projection is not constant")
    if bos.shape != weight.shape[:1]:
        raise GraphPassError(
            f"{layer} reads text of width {weight.shape[0]}, but the stored embedding of the first token has shape "
            f"{list(bos.shape)}; it belongs to another text encoder"
        )
    end, bias = node.outputs[0], np.zeros(weight.shape[1])
    follower = only_consumer(end)
    if follower is not None and follower.op_type == "Add" and module_of(follower) == module_of(node):
        addend = constant_expression(model, input_of(follower, 1 if follower.inputs[0] is end else 0))
        if addend is None:
            raise GraphPassError(f"{layer}: the bias of the first token's projection is not constant")
        end, bias = follower.outputs[0], addend.astype(np.float64).reshape(-1)
    constant = bos.astype(np.float64) @ weight.astype(np.float64) + bias
    rows = np.stack([constant, np.broadcast_to(bias, constant.shape), np.full_like(constant, np.nan)])
    return _Projection(layer, node, token, end, _rounded(layer, rows, dtype_of(end)))


def _rounded(layer: str, rows: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = rows.astype(dtype.numpy())
    if np.isinf(narrow).any():
        raise GraphPassError(
            f"{layer}: the projection of the first token reaches {np.abs(rows[:2]).max():.3g}, which {dtype} cannot "
            "hold; set `body: fp32`"
        )
    return narrow


def _write_lookup(projections: Sequence[_Projection], bos: np.ndarray) -> ir.Value:
    """Lets one table make all projections (in the graph's order); returns the column that is 0 or, for kind 2, NaN."""
    first = projections[0]
    writer = NodeWriter(first.node, _MODULE)
    kind = _kind(writer, first.token, bos)
    body = dtype_of(first.out)
    columns = [item.rows for item in projections]
    columns.append(np.array([[0], [0], [np.nan]], first.rows.dtype))
    table = np.concatenate(columns, axis=1)
    batch = shape_of(first.token)[0]
    values = writer.op("Gather", [writer.constant("rows", table), kind], dtype=body, shape=[batch, table.shape[1]])
    widths = [item.shape[1] for item in columns]
    sizes = writer.constant("widths", np.array(widths, np.int64))
    *parts, guard = writer.many("Split", [values, sizes], {"axis": 1}, [[batch, width] for width in widths])
    axis = writer.constant("token_axis", np.array([1], np.int64))
    for item, part in zip(projections, parts, strict=True):
        shape = [batch, 1, item.rows.shape[1]]
        replace_value(item.out, writer.op("Unsqueeze", [part, axis], dtype=body, shape=shape))
    return guard


def _kind(writer: NodeWriter, token: ir.Value, bos: np.ndarray) -> ir.Value:
    """INT64 ``[N]``: 0 for the stored embedding, 1 for zeros, 2 for anything else (NaN included), judged in FP32."""
    single = ir.DataType.FLOAT
    batch = shape_of(token)[0]
    axes = writer.constant("axes", np.array([1, 2], np.int64))
    wide = writer.cast(token, single)

    def total(value: ir.Value) -> ir.Value:
        return writer.op("ReduceSum", [value, axes], {"keepdims": 0}, dtype=single, shape=[batch])

    embedding = bos.astype(np.float32).reshape(1, 1, -1)
    away = writer.op("Sub", [wide, writer.constant("embedding", embedding)], like=wide)
    limit = np.float32(_SAME_SQUARED * np.square(bos, dtype=np.float64).sum())
    distance = total(writer.op("Mul", [away, away], like=wide))
    near = writer.op("LessOrEqual", [distance, writer.constant("limit", limit)], dtype=ir.DataType.BOOL, shape=[batch])
    # a sum of magnitudes, since squares of small numbers vanish, and a NaN must not
    magnitude = total(writer.op("Abs", [wide], like=wide))
    zero = writer.op(
        "Equal", [magnitude, writer.constant("nothing", np.float32(0))], dtype=ir.DataType.BOOL, shape=[batch]
    )
    known, empty, other = (writer.constant("kind", np.int64(number)) for number in range(3))
    rest = writer.op("Where", [zero, empty, other], dtype=ir.DataType.INT64, shape=[batch])
    return writer.op("Where", [near, known, rest], dtype=ir.DataType.INT64, shape=[batch])
