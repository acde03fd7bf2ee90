"""The outputs of a small graph for many values of its one input: the rows of a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from qdexport.graph.dialect import FAKE_QUANTIZE, NO_AXIS
from qdexport.graph.edit import add_constant, remove_unused, replace_value
from qdexport.graph.evaluate import evaluate, evaluator, subgraph
from qdexport.graph.query import const_or_none, dtype_of, int_attr, shape_of, value_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

__all__ = ["evaluate_rows", "keeps_rows_apart"]

_AT_ONCE: Final = 128  # rows: enough to read the weights of a product seldom, few enough for wide ones
_EACH: Final = frozenset({"Cast", "Cos", "Erf", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Sqrt", "Tanh"})
_BROADCASTING: Final = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})


def evaluate_rows(model: ir.Model, values: Sequence[float]) -> np.ndarray:
    """Runs a graph, whose one input has one element, for each value.

    What is constant is computed once. Where no operator mixes rows, many values run at once, which equals one after the
    other up to the order of sums: BLAS sums a single row in another order than several.

    Args:
        model: is used up.
        values: of the input.

    Returns:
        All outputs of each value, flattened: FP32 ``[values, numbers]``.
    """
    _compute_constants(model)
    (source,) = model.graph.inputs
    outputs = [value_name(value) for value in model.graph.outputs]
    fed = np.array(values, dtype_of(source).numpy())
    size = _AT_ONCE if all(keeps_rows_apart(node) for node in model.graph) else 1
    run = evaluator(model)
    blocks = []
    for start in range(0, len(fed), size):
        block = fed[start : start + size]
        results = run({value_name(source): block})
        parts = [np.asarray(results[name], np.float32).reshape(len(block), -1) for name in outputs]
        blocks.append(np.concatenate(parts, axis=1))
    return np.concatenate(blocks)


def _compute_constants(model: ir.Model) -> None:
    """Puts numbers in the place of what depends on constants alone: a weight behind its quantizer, frequencies."""
    computed: dict[ir.Value, None] = {}
    for node in model.graph:
        if all(value is None or value in computed or const_or_none(value) is not None for value in node.inputs):
            computed.update(dict.fromkeys(node.outputs))
    read = [value for value in computed if any(use.node.outputs[0] not in computed for use in value.uses())]
    if read:
        numbers = evaluate(subgraph(model, [], read), {})
        for value in read:
            replace_value(value, add_constant(model.graph, f"{value_name(value)}/computed", numbers[value_name(value)]))
        remove_unused(model)


def keeps_rows_apart(node: ir.Node) -> bool:
    """Whether each row of the result comes from that row of what is computed, all else being constant.

    Rows are the first dimension. False for an operator that is not known here.
    """
    inputs = [value for value in node.inputs if value is not None]
    rank = len(shape_of(node.outputs[0]))
    if node.op_type in _BROADCASTING:
        return all(_fits(value, rank) for value in inputs)
    if node.op_type == "Concat":
        return int_attr(node, "axis") % rank != 0 and not any(map(_is_constant, inputs))
    if node.op_type not in _RULES or [_is_constant(value) for value in inputs] != [False] + [True] * (len(inputs) - 1):
        return False
    return _RULES[node.op_type](node, inputs, rank)


def _is_constant(value: ir.Value | None) -> bool:
    return const_or_none(value) is not None


def _is_scalar(value: ir.Value) -> bool:
    return _numbers(value).size == 1


def _numbers(value: ir.Value) -> np.ndarray:
    array = const_or_none(value)
    return np.empty(0) if array is None else array


def _fits(value: ir.Value, rank: int) -> bool:
    """Whether an operand of that rank's result has either the rows, or one for all of them."""
    shape = shape_of(value)
    return len(shape) == rank if not _is_constant(value) else len(shape) < rank or shape[0] == 1


def _reshapes_rows(value: ir.Value, target: np.ndarray) -> bool:
    """Whether a Reshape gives each row another shape: as many rows as there are, and as many numbers in each."""
    size = math.prod(dim if isinstance(dim, int) else 0 for dim in shape_of(value)[1:])
    return int(target[0]) == -1 and size == target[1:].prod()


def _leaves_first(axes: ir.Value, rank: int) -> bool:
    return not (_numbers(axes) % rank == 0).any()


# of operators that read constants behind their first input: the node, its inputs, and the rank of its result
_RULES: Final[dict[str, Callable[[ir.Node, list[ir.Value], int], bool]]] = {
    **dict.fromkeys(_EACH, lambda _node, _inputs, _rank: True),
    "Split": lambda node, _, rank: int_attr(node, "axis", 0) % rank != 0,
    "Slice": lambda _, inputs, rank: len(inputs) > 3 and _leaves_first(inputs[3], rank),
    "Unsqueeze": lambda _, inputs, rank: _leaves_first(inputs[1], rank),
    "Reshape": lambda _, inputs, _rank: _reshapes_rows(inputs[0], _numbers(inputs[1])),
    "MatMul": lambda _, inputs, rank: len(shape_of(inputs[0])) > 1 and len(shape_of(inputs[1])) == 2,
    "Gemm": lambda node, inputs, rank: int_attr(node, "transA", 0) == 0 and all(_fits(v, rank) for v in inputs[2:]),
    FAKE_QUANTIZE: lambda node, inputs, _: int_attr(node, "axis") == NO_AXIS and all(map(_is_scalar, inputs[1:])),
}
