"""Constants of an FP16 file as they were before they were rounded, and what a rounding may be off by.

PyTorch divides by ``r`` where the file has ``1 / r`` in the constants of a norm or a layer (pass fold-reparam), each of
which was rounded to FP16 once. Where a stored number is exactly what the quotient is rounded to, the network is
executed with the quotient, so that nothing that is compared has to allow for 2^-12. A number that is none stays as it
is stored, and differs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdexport.core.layer_names import layers_of
from qdexport.quant.modules import ChannelScale

__all__ = ["half_units", "inverses", "stored_roundings", "unrounded_quotients"]

Rows = NDArray[np.float64]
_MOVES: Final = frozenset({"Cast", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_LEAST: Final = -13  # frexp's exponent of 2^-14: smaller numbers are 2^-24 apart
_TWICE: Final = 3  # 2^-11 of a number are up to two half units of it, and the second rounding is one more


def inverses(denoiser: nn.Module) -> list[Tensor]:
    """Every ``1 / r``, FP32 ``[C]``."""
    return [item.inverse.flatten() for item in denoiser.modules() if isinstance(item, ChannelScale)]


def half_units(numbers: Tensor) -> Tensor:
    """How far a number may be from the FP16 number that it is rounded to, float64 of the same shape."""
    exponent = torch.frexp(numbers.to(torch.float64))[1].clamp_(min=_LEAST)
    return torch.exp2(exponent.to(torch.float64) - 12)


def stored_roundings(value: ir.Value, *, scaled: bool = False) -> int:
    """How many half units of FP16 a value may be off that is looked up in a table; 0 where it is none of FP16.

    Args:
        value: of a file.
        scaled: the table was rounded, multiplied by ``1 / r``, and rounded again.
    """
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.inputs[0] is None:
        return 0
    table = node.inputs[0]
    if table.const_value is None or table.dtype != ir.DataType.FLOAT16:
        return 0
    return _TWICE if scaled else 1


def unrounded_quotients(model: ir.Model, denoiser: nn.Module, without: Container[str] = ()) -> dict[ir.Value, Tensor]:
    """The FP16 constants of a file that are parameters with a ``1 / r`` in them, as they were before they were rounded.

    Args:
        model: an emitted graph.
        denoiser: the fake-quant model.
        without: layers whose constants stay as they are.

    Returns:
        By constant, float64 of its shape. Constants that are parameters themselves are not among them.
    """
    vectors = [item.double().numpy() for item in inverses(denoiser)]
    if not vectors:
        return {}
    halves = [item.detach() for item in denoiser.parameters() if item.dim() and item.dtype == torch.float16]
    # a norm without weights has ones in the file, and so has adaLN's 1 + scale
    ones = [np.ones((size, 1), np.float16) for size in {len(item) for item in vectors}]
    known = _Parameters([*(_rows(item.numpy(force=True)) for item in halves), *ones])
    found = {}
    for value in _half_constants(model, without):
        array = value.const_value.numpy()  # type: ignore[union-attr]  # it is a constant
        right = known.quotients(array, vectors)
        if right is not None:
            found[value] = torch.from_numpy(right)
    return found


def _half_constants(model: ir.Model, without: Container[str]) -> Iterator[ir.Value]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and value.dtype == ir.DataType.FLOAT16 and tensor.size > 1:
            modules = [(use.node.name or "").rpartition("/")[0] for use in value.uses()]
            if not any(layer in without for module in modules for layer in layers_of(module)):
                yield value


def _rows(array: NDArray[np.float16]) -> NDArray[np.float16]:
    """A row of numbers for each channel of a layer's output: ``[C, K]``."""
    return array.reshape(len(array), -1)


class _Parameters:
    """FP16 parameters, by the length of a row."""

    def __init__(self, parameters: Sequence[NDArray[np.float16]]) -> None:
        self._by_width: dict[int, list[NDArray[np.float16]]] = {}
        for item in sorted(parameters, key=len, reverse=True):
            self._by_width.setdefault(item.shape[1], []).append(item)
        self._plain = {item.tobytes() for item in parameters}

    def quotients(self, stored: NDArray[np.float16], vectors: Sequence[Rows]) -> Rows | None:
        """The numbers that a constant was rounded from; None if it is a parameter itself, or something else."""
        squeezed = stored.squeeze()
        if stored.tobytes() in self._plain or squeezed.ndim == 0:
            return None
        for transposed in (False, True)[: 1 + (squeezed.ndim == 2)]:
            rows = _rows(np.ascontiguousarray(squeezed.T if transposed else squeezed))
            if transposed and rows.tobytes() in self._plain:
                return None
            right = self._joined(rows, vectors)
            if right is not None:
                right = right.reshape(squeezed.T.shape).T if transposed else right
                return np.ascontiguousarray(right).reshape(stored.shape)
        return None

    def _joined(self, rows: NDArray[np.float16], vectors: Sequence[Rows]) -> Rows | None:
        """One parameter behind the other (pass merge-projections), each with some of its channels scaled."""
        parts: list[Rows] = []
        first = 0
        while first < len(rows):
            part = self._one(rows[first:], vectors)
            if part is None:
                return None
            parts.append(part)
            first += len(part)
        return np.concatenate(parts)

    def _one(self, rows: NDArray[np.float16], vectors: Sequence[Rows]) -> Rows | None:
        for parameter in self._by_width.get(rows.shape[1], []):
            if len(parameter) <= len(rows):
                right = _scaled(parameter, rows[: len(parameter)], vectors)
                if right is not None:
                    return right
        return None


def _scaled(parameter: NDArray[np.float16], rows: NDArray[np.float16], vectors: Sequence[Rows]) -> Rows | None:
    """A parameter in float64 with those channels scaled that make it round to ``rows``; None where none do."""
    right = parameter.astype(np.float64)
    if not np.array_equal(np.signbit(rows), np.signbit(parameter)):
        return None  # r is positive: most parameters end here
    open_rows = (rows != parameter).any(axis=1)
    for vector in vectors if open_rows.any() else ():
        size = len(vector)
        if len(parameter) % size:
            continue
        for start in range(0, len(parameter), size):
            part = slice(start, start + size)
            product = right[part] * vector[:, None]
            if open_rows[part].any() and np.array_equal(product.astype(np.float16), rows[part]):
                right[part], open_rows[part] = product, False
    return None if open_rows.any() else right

