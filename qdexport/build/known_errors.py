"""Error texts of the TensorRT builders, what they mean, and what to do about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdexport.build.suspects import int4_convolutions, int4_products

if TYPE_CHECKING:
    import onnx

__all__ = ["KNOWN_ERRORS", "KnownError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownError:
    """One row of the table.

    Attributes:
        pattern: a regular expression for the builder's text.
        advice: cause and remedy, for the user.
        suspects: where in the graph to look, for texts that name no node.
    """

    pattern: str
    advice: str
    suspects: Callable[[onnx.GraphProto], list[str]] | None = None


KNOWN_ERRORS = (
    KnownError(
        pattern=r"shiftIsAllZeros",
        advice="a quantizer has a zero point other than 0, with which TensorRT does not compute: use a "
        "symmetric quantizer, or let the pass lower-zero-point move the zero point out of it",
    ),
    KnownError(
        pattern=r"scaleAllPositive",
        advice="a quantizer has a scale that is 0 or negative: its calibration saw no data; calibrate again",
    ),
    KnownError(
        pattern=r"must (?:be of|have) same (?:input )?types?",
        advice="the operands have different types: a DequantizeLinear gives the type of its scale; let the "
        "pass legalize-types put a Cast after it",
    ),
    KnownError(
        pattern=r"legalUINT8|does not support UINT8",
        advice="TensorRT computes with signed integers only: use INT8 with zero point 0",
    ),
    KnownError(
        pattern=r"[Oo]ptimization profile|[Pp]rofile .*dimension",
        advice="the dynamic dimensions of the file and the ranges of the recipe's shapes do not agree: "
        "export and build with the same shapes",
    ),
    KnownError(
        pattern=r"Failed to open file|Failed to parse the ONNX model",
        advice="the ONNX file or its external data is missing or damaged: keep model.onnx and "
        "model.onnx.data in one folder, or export again",
    ),
    KnownError(
        pattern=r"Plugin not found",
        advice="the operator was not lowered to standard ONNX, and the target has no plugin of its name",
    ),
    KnownError(
        pattern=r"cannot be imported into TensorRT",
        advice="the builder does not import constants of this type (UINT4 and narrower ones): store the "
        "codes as INT8, or as INT4 for linear layers",
    ),
    KnownError(
        pattern=r"blocking dimension must be",
        advice="block-wise scales are for linear layers only: give a convolution one scale per output "
        "channel",
    ),
    KnownError(
        pattern=r"CHECK\(dtype == W\.type\(\)\)",
        advice="the builder has no convolution with INT4 weights and INT8 inputs: store the codes as INT8",
        suspects=int4_convolutions,
    ),
    KnownError(
        pattern=r"operand\.h:\d+: CHECK\(is_constant\(\)\)|lhs_scale->type\(\), rhs_scale->type\(\)",
        advice="INT4 weights with INT8 inputs need one scale per output channel, and scales of one type on "
        "both sides of the product",
        suspects=int4_products,
    ),
    KnownError(
        pattern=r"HW-specific datatypes",
        advice="one of the compute capabilities cannot compute with this type (FP8 needs 8.9, FP4 needs "
        "12.0, INT4 needs 8.0): build without that capability, or without that type",
    ),
    KnownError(
        pattern=r"the new name is already in use",
        advice="two nodes have one name, or a local function with quantizers is called twice: make node "
        "names unique and inline functions",
    ),
    KnownError(
        pattern=r"only allowed before DQ|validateQuantizedTypesProducersConsumers",
        advice="TensorRT does no arithmetic on INT8 tensors: put a DequantizeLinear in front",
    ),
    KnownError(
        pattern=r"Node input was not registered",
        advice="a node reads a tensor that nothing makes: the file is incomplete, export again",
    ),
    KnownError(
        pattern=r"was not supported by a dedicated kernel",
        advice="the builder has no kernel for this Attention operator: write it as MatMul, Softmax, MatMul",
    ),
    KnownError(
        pattern=r"bad_alloc|[Oo]ut of memory|Cannot allocate memory",
        advice="use a machine with more memory, or build for a smaller batch or latent",
    ),
)
