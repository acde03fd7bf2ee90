"""Crops large constants of which the network reads a part: SD3 has positions for 192 x 192 patches, at 64 x 64 used.

Small ones are folded anyway. The weights of a split layer stay whole: their parts are made when codes are computed from
them, so that no second copy is in memory. Numbers stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from qdexport.graph.dialect import FAKE_QUANTIZE

__all__ = ["crop_constants"]

# a later Slice cuts more, the others read weights
_NOT_FOR = frozenset({"Slice", FAKE_QUANTIZE, "Conv", "MatMul", "Gemm"})


def crop_constants(model: ir.Model, above: int) -> int:
    """Replaces slices of constants, and slices of reshaped ones, by smaller constants.

    Args:
        model: is changed; nodes that nobody reads any more are left in it.
        above: number of elements from which on it looks at a constant.

    Returns:
        How many constants were made.
    """
    made = 0
    for node in list(model.graph):
        result = node.outputs[0]
        if node.op_type != "Slice" or any(user.op_type in _NOT_FOR for user, _ in result.uses()):
            continue
        chain = _chain(node)
        source = chain[0].inputs[0]
        if source is None or source.const_value is None or not source.is_initializer() or source.is_graph_output():
            continue
        if source.const_value.size <= above:
            continue
        array = _evaluate(np.asarray(source.const_value.numpy()), chain)
        if array is None or array.size >= source.const_value.size:
            continue
        name = f"{source.name}/part_{made}"
        part = ir.Value(name=name, shape=ir.Shape(array.shape), type=source.type)
        part.const_value = ir.tensor(np.ascontiguousarray(array), dtype=source.const_value.dtype, name=name)
        model.graph.register_initializer(part)
        result.replace_all_uses_with(part)
        made += 1
    return made


def _chain(last: ir.Node) -> list[ir.Node]:
    """A node and the Slices and Reshapes in front of it, the first one first."""
    chain = [last]
    while (value := chain[0].inputs[0]) is not None:
        maker = value.producer()
        if maker is None or maker.op_type not in {"Slice", "Reshape"}:
            break
        chain.insert(0, maker)
    return chain


def _evaluate(array: np.ndarray, chain: list[ir.Node]) -> np.ndarray | None:
    """The numbers of a chain's end; None where a size is not known before the run."""
    for node in chain:
        known = [None if item is None else get_const_tensor(item) for item in node.inputs[1:]]
        if any(item is not None and tensor is None for item, tensor in zip(node.inputs[1:], known, strict=True)):
            return None
        numbers = [None if tensor is None else tensor.numpy().reshape(-1).tolist() for tensor in known]
        array = array[_slices(array, numbers)] if node.op_type == "Slice" else _reshaped(array, numbers[0], node)
    return array


def _slices(array: np.ndarray, numbers: list[Any]) -> tuple[slice, ...]:
    """ONNX's starts, ends, axes and steps."""
    starts, ends, axes, steps = (*numbers, None, None)[:4]
    chosen = [slice(None)] * array.ndim
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = index if axes is None else axes[index]
        chosen[axis] = slice(start, end, 1 if steps is None else steps[index])
    return tuple(chosen)


def _reshaped(array: np.ndarray, shape: Any, node: ir.Node) -> np.ndarray:
    keep = node.attributes.get_int("allowzero", 0) == 0
    return array.reshape([array.shape[axis] if size == 0 and keep else size for axis, size in enumerate(shape)])
