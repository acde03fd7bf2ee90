"""An ONNX graph in float64, value by value: only what is asked for is computed, and only what is still read is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qdexport.check.float64.operands import from_numpy
from qdexport.check.float64.ops import execute
from qdexport.errors import ParityError
from qdexport.graph.query import only_consumer, value_name

__all__ = ["SCALE_ROUNDINGS", "Float64Graph", "attention_scales", "unrounded_numbers"]

SCALE_ROUNDINGS: Final = 2.0**-9  # of several factors that were rounded to FP16
# of activations that are written out: GELU's in both forms and CLIP's, which PyTorch multiplies by unrounded
_ACTIVATIONS: Final = (1.702, 0.044715, (2 / math.pi) ** 0.5, 0.5**0.5, 2**0.5)
_NUMBERS: Final = {float(np.float16(number)): number for number in _ACTIVATIONS}
_CACHED_ELEMENTS: Final = 1 << 16  # smaller constants are converted once


class Float64Graph:
    """Executes a graph in float64.

    Floating-point inputs become float64, but for a timestep: what is made of it alone stays in FP32, as in PyTorch.
    Weights are converted when they are read, so that no second copy of a model is in memory.

    Args:
        model: an emitted graph; nothing in it is changed.
        keep: values that will be asked for, even behind those that read them.
        unrounded: constants that are executed with other numbers than those of the file, which are roundings of them;
            those of :func:`unrounded_numbers` where nothing is said.
    """

    def __init__(
        self, model: ir.Model, keep: Iterable[ir.Value] = (), unrounded: Mapping[ir.Value, Tensor] | None = None
    ) -> None:
        self._inputs = {str(value.name): value for value in model.graph.inputs}
        self._uses = Counter(
            value for node in model.graph for value in node.inputs if value is not None
        )
        self._uses.update(model.graph.outputs)
        self._uses.update(keep)
        self._left: Counter[ir.Value] = Counter()
        self._values: dict[ir.Value, Tensor] = {}
        self._constants: dict[ir.Value, Tensor] = {}
        self.outputs = list(model.graph.outputs)
        self._constants.update(unrounded_numbers(model) if unrounded is None else unrounded)

    def start(self, inputs: Mapping[str, Tensor], narrow: str = "timestep") -> None:
        """Begins a call; inputs that the graph does not read are left out."""
        self._left = Counter(self._uses)
        self._values = {
            self._inputs[name]: item.to(torch.float64) if item.is_floating_point() and name != narrow else item
            for name, item in inputs.items()
            if name in self._inputs
        }

    def force(self, value: ir.Value, tensor: Tensor) -> None:
        """Lets everything that was not computed yet read ``tensor`` in place of a value."""
        self._values[value] = tensor

    def release(self, value: ir.Value) -> None:
        """Gives up one right to a value that was to be kept."""
        self._read(value)

    def value(self, wanted: ir.Value) -> Tensor:
        """Computes a value, and what it needs.

        Raises:
            ParityError: a node cannot be executed, or an input is missing.
        """
        stack = [wanted]
        while stack:
            value = stack[-1]
            if value in self._values or value.const_value is not None:
                stack.pop()
                continue
            node = value.producer()
            if node is None:
                raise ParityError(f"the ONNX file has an input {value_name(value)} that the model has not")
            missing = [
                item
                for item in node.inputs
                if item is not None and item not in self._values and item.const_value is None
            ]
            if missing:
                stack.extend(missing)
                continue
            self._run(node)
            stack.pop()
        return self._get(wanted)

    def _run(self, node: ir.Node) -> None:
        outputs = execute(node, [None if item is None else self._get(item) for item in node.inputs])
        for item in node.inputs:
            if item is not None:
                self._read(item)
        for value, tensor in zip(node.outputs, outputs, strict=False):
            self._values.setdefault(value, tensor)

    def _read(self, value: ir.Value) -> None:
        self._left[value] -= 1
        if self._left[value] <= 0:
            self._values.pop(value, None)

    def _get(self, value: ir.Value) -> Tensor:
        found = self._values.get(value)
        if found is not None:
            return found
        if value in self._constants:
            return self._constants[value]
        if value.const_value is None:
            raise ParityError(f"{value_name(value)} has no value")
        tensor = from_numpy(value.const_value.numpy())
        if tensor.numel() <= _CACHED_ELEMENTS:
            self._constants[value] = tensor
        return tensor


def attention_scales(model: ir.Model) -> Iterator[tuple[ir.Node, float, float, list[ir.Value]]]:
    """For every product of queries and keys the factor that PyTorch takes by default (``1 / sqrt(D)``), the one that
    the file multiplies by, and its constants.
    """
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        behind = _behind_product(node)
        if behind is None:
            continue
        query = node.inputs[0]
        depth = None if query is None or query.shape is None else query.shape[-1]
        before = [value for item in node.inputs if (value := _factor(None if item is None else item.producer()))]
        constants = [*before, *behind]
        if isinstance(depth, int):
            yield node, depth**-0.5, math.prod(_number(value) for value in constants), constants


def unrounded_numbers(model: ir.Model) -> dict[ir.Value, Tensor]:
    """Numbers in FP16 as PyTorch has them, which multiplies by what is not rounded: factors of attention and GELU."""
    return {**_activation_numbers(model), **_unrounded_scales(model)}


def _activation_numbers(model: ir.Model) -> dict[ir.Value, Tensor]:
    found = {}
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None and value.const_value.size == 1:
            number = _NUMBERS.get(_number(value))
            if number is not None:
                found[value] = _filled(value, number)
    return found


def _filled(value: ir.Value, number: float) -> Tensor:
    return torch.full([int(str(size)) for size in value.shape or ()], number, dtype=torch.float64)


def _unrounded_scales(model: ir.Model) -> dict[ir.Value, Tensor]:
    """The factors of attention before they were rounded to FP16, where they are exactly roundings of ``1 / sqrt(D)``.

    PyTorch has the number itself, and FP16 is up to 2^-12 away from it, which softmax multiplies.
    """
    found: dict[ir.Value, Tensor] = {}
    for _, exact, stored, constants in attention_scales(model):
        half = [value for value in constants if value.dtype == ir.DataType.FLOAT16]
        if not half or stored <= 0 or abs(stored / exact - 1) > SCALE_ROUNDINGS:
            continue
        for value in half:
            right = _number(value) * (exact / stored) ** (1 / len(half))
            if _number(value) in _roundings(exact, len(half)):
                found[value] = _filled(value, right)
    return found


def _roundings(exact: float, count: int) -> set[float]:
    """What each of so many FP16 constants may be whose product is ``exact``.

    It is the number itself, or its square root on either side (PyTorch's exporter takes it of the number or of its
    rounding), or the two multiplied again in FP16 (pass plain-attention).
    """
    roots = {np.float16(math.sqrt(number)) for number in (exact, float(np.float16(exact)))}
    return {float(np.float16(exact)), *(float(root * root) for root in roots)} if count == 1 else set(map(float, roots))


def _number(value: ir.Value) -> float:
    return 0.0 if value.const_value is None else float(value.const_value.numpy().reshape(-1)[0])


def _behind_product(node: ir.Node) -> list[ir.Value] | None:
    """The factors between a product and the Softmax that reads it; None where none does."""
    constants = []
    reader = only_consumer(node.outputs[0])
    while reader is not None and reader.op_type in {"Add", "Cast", "Mul"}:
        if reader.op_type == "Mul":
            constants += [value for value in [_factor(reader)] if value is not None]
        reader = only_consumer(reader.outputs[0])
    return constants if reader is not None and reader.op_type == "Softmax" else None


def _factor(node: ir.Node | None) -> ir.Value | None:
    """The number that a node multiplies by, or one that stands in front of it, behind data movement."""
    while node is not None and node.op_type in {"Cast", "Transpose", "Reshape"} and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Mul":
        return None
    numbers = (item for item in node.inputs if item is not None and item.const_value is not None)
    return next((item for item in numbers if item.const_value is not None and item.const_value.size == 1), None)
