"""What operators in float64 read: constants, optional inputs, axes; and one operator by onnx's reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

__all__ = [
    "NARROW",
    "WIDE",
    "Attributes",
    "Inputs",
    "Result",
    "axes_of",
    "by_reference",
    "from_numpy",
    "ints",
    "one",
    "optional",
    "widened",
]

Inputs = Sequence[Tensor | None]
Attributes = Mapping[str, Any]
Result = Tensor | tuple[Tensor, ...]

WIDE: Final = torch.float64
NARROW: Final = (torch.float16, torch.bfloat16, torch.float32)


def from_numpy(array: np.ndarray) -> Tensor:
    """A constant: FP16 and narrower numbers as FP32, 4-bit integers as INT8."""
    kind = array.dtype
    if kind in (np.float32, np.float64, np.bool_) or kind.kind in "iu":
        if kind.kind == "u" and kind.itemsize > 1:
            array = array.astype(np.int64)
        return torch.from_numpy(np.array(array, copy=True))
    name = kind.name
    return torch.from_numpy(array.astype(np.int8 if "int" in name else np.float32))


def widened(*tensors: Tensor) -> list[Tensor]:
    """In float64, if one of them is."""
    if not any(item.dtype == WIDE for item in tensors):
        return list(tensors)
    return [item.to(WIDE) if item.dtype in NARROW else item for item in tensors]


def by_reference(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    names = [f"input_{index}" if item is not None else "" for index, item in enumerate(inputs)]
    outputs = [f"output_{index}" for index in range(len(node.outputs))]
    proto = ir.to_proto(node)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(outputs)
    any_type = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [onnx.helper.make_value_info(name, any_type) for name in names if name],
        [onnx.helper.make_value_info(name, any_type) for name in outputs],
    )
    version = node.graph.opset_imports.get(node.domain, 20) if isinstance(node.graph, ir.Graph) else 20
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(node.domain, version)])
    feeds = {name: item.numpy() for name, item in zip(names, inputs, strict=True) if item is not None}
    results: list[Any] = ReferenceEvaluator(model).run(None, feeds)  # type: ignore[assignment]  # onnx has it wider
    return tuple(from_numpy(np.asarray(item)) for item in results)


def one(inputs: Inputs, index: int = 0) -> Tensor:
    item = inputs[index] if index < len(inputs) else None
    if item is None:
        raise ValueError(f"input {index} is missing")
    return item


def optional(inputs: Inputs, index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def ints(inputs: Inputs, index: int) -> list[int]:
    return [int(value) for value in one(inputs, index).reshape(-1).tolist()]


def axes_of(attributes: Attributes, inputs: Inputs, index: int = 1) -> list[int] | None:
    if optional(inputs, index) is not None:
        return ints(inputs, index)
    given = attributes.get("axes")
    return None if given is None else list(given)
