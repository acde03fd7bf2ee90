"""Executes graphs in numpy, FakeQuantize included: the oracle that passes are checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qdexport.core.spec import NVFP4_BLOCK
from qdexport.graph.dialect import DOMAIN, LOG2_ZERO
from qdexport.graph.narrow_floats import e4m3_round, nvfp4_codes
from qdexport.graph.nvfp4 import TRT_DOMAIN
from qdexport.graph.query import const_or_none

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "constant_expression",
    "evaluate",
    "evaluator",
    "fake_quantize_codes",
    "log2_codes",
    "subgraph",
]

_BLOCKED = 3  # rank of a weight's scales per block


def fake_quantize_codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """``clip(rint(x / scale) + zero_point, qmin, qmax)`` in FP32, half to even; parameters broadcast against ``x``."""
    ratio = np.divide(x, scale, dtype=np.float32)
    np.rint(ratio, out=ratio)
    ratio += zero_point
    return cast("np.ndarray", np.clip(ratio, qmin, qmax, out=ratio))


def log2_codes(x: np.ndarray, scale: np.ndarray, qmax: int) -> np.ndarray:
    """``clip(rint(-log2(x / scale)), 0, qmax)`` as FP32; ``qmax`` for ``x <= 0``.

    Read off the binary exponent, so that no logarithm is rounded: with ``x / scale = m 2^e`` and ``m`` in [1/2, 1) the
    code is ``-e``, and one more where ``m`` is below the square root of 1/2.
    """
    mantissa, exponent = np.frexp(np.divide(x, scale, dtype=np.float32))
    codes = np.where(mantissa < np.float32(np.sqrt(0.5)), 1 - exponent, -exponent)
    return np.where(mantissa > 0, np.clip(codes, 0, qmax), qmax).astype(np.float32)


class FakeQuantize(OpRun):
    """``qdexport::FakeQuantize`` for onnx's reference evaluator."""

    op_domain = DOMAIN

    def _run(  # noqa: PLR0913  the signature of the operator
        self,
        x: np.ndarray,
        scale: np.ndarray,
        zero_point: np.ndarray,
        row: np.ndarray | None = None,
        mode: np.ndarray | None = None,
        *,
        qmin: int,
        qmax: int,
        axis: int,
        form: str = "int",
    ) -> tuple[np.ndarray]:
        if form == "nvfp4":
            values, narrow = nvfp4_codes(x, scale)
            wide = np.repeat(narrow * np.float32(scale.reshape(-1)[0]), NVFP4_BLOCK, axis=-1)
            return ((values * wide).astype(x.dtype),)
        if scale.ndim == _BLOCKED:
            block = x.shape[1] // scale.shape[2]
            wide, zero = (np.repeat(table[0], block, axis=1) for table in (scale, zero_point))
            return (((fake_quantize_codes(x, wide, zero, qmin, qmax) - zero) * wide).astype(x.dtype),)
        index = np.zeros(1, np.int64) if row is None else row
        scale, zero_point = scale[index], zero_point[index]
        shape = [scale.shape[0]] + [1] * (x.ndim - 1)
        if axis >= 0:
            shape[axis] = scale.shape[-1]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        if form == "fp8":
            codes = e4m3_round(np.divide(x, scale, dtype=np.float32))
        else:
            codes = fake_quantize_codes(x, scale, zero_point, qmin, qmax)
        values = (codes - zero_point) * scale
        if mode is not None:
            powers = log2_codes(x, scale, qmax)
            logarithmic = np.where(powers < min(qmax, LOG2_ZERO), scale * np.exp2(-powers), np.float32(0))
            values = np.where(mode[index].reshape(shape) == 1, logarithmic, values)
        return (values.astype(x.dtype),)


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801  named as the operator
    """TensorRT's dynamic quantizer for onnx's reference evaluator: codes in E2M1, scales of blocks in E4M3."""

    op_domain = TRT_DOMAIN

    def _run(
        self, x: np.ndarray, scale: np.ndarray, *, axis: int, block_size: int, scale_type: int
    ) -> tuple[np.ndarray, np.ndarray]:
        del axis, block_size, scale_type  # the pass writes -1, 16 and E4M3 alone
        codes, narrow = nvfp4_codes(x, scale)
        return codes.astype(ml_dtypes.float4_e2m1fn), narrow.astype(ml_dtypes.float8_e4m3fn)


def evaluate(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a model in numpy and returns its outputs by name. Slow and exact; meant for small graphs."""
    return evaluator(model)(feeds)


def evaluator(model: ir.Model | onnx.ModelProto) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Prepares a model once, for many runs like :func:`evaluate`."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    runner = ReferenceEvaluator(proto, new_ops=[FakeQuantize, TRT_FP4DynamicQuantize])
    names = list(runner.output_names)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, cast("list[Any]", runner.run(None, dict(feeds))), strict=True))

    return run


def subgraph(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """A copy of what lies between ``inputs`` and ``outputs``, as a model of its own; the source is untouched."""
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    graph.opset_imports.update(model.graph.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version)


def constant_expression(model: ir.Model, value: ir.Value) -> np.ndarray | None:
    """The numbers of a value that depends on constants alone; None for anything that depends on an input."""
    array = const_or_none(value)
    if array is not None:
        return array
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        if item.is_graph_input() and not item.is_initializer():
            return None
        producer = item.producer()
        if producer is not None and id(producer) not in seen:
            seen.add(id(producer))
            stack.extend(source for source in producer.inputs if source is not None)
    return next(iter(evaluate(subgraph(model, [], [value]), {}).values()))
