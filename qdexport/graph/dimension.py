"""Sizes of symbolic dimensions: expressions over the names of the network's dynamic dimensions."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["size_of"]

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def size_of(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension such as ``height*width/4``.

    Args:
        dim: a number, or a sum, difference, product or quotient of numbers and names.
        sizes: of the dimensions that the expression is made of, by name.

    Returns:
        The size; None for a dimension that is unknown, names another one, or does not come out as a whole number.
    """
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    try:
        value = _evaluated(ast.parse(str(dim.value), mode="eval").body, sizes)
    except (SyntaxError, LookupError, ZeroDivisionError, TypeError):
        return None
    return int(value) if value.denominator == 1 else None


def _evaluated(node: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    if isinstance(node, ast.Name):
        return Fraction(sizes[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluated(node.left, sizes), _evaluated(node.right, sizes))
    raise LookupError(ast.dump(node))
