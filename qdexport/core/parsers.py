"""What the ONNX parsers of TensorRT take: operators, element types, and inputs that must be constants.

Of TensorRT 10 the oldest that Jetson devices have counts (10.3 of JetPack 6). The list is that of the open-source
parser (onnx-tensorrt, release 10.1, docs/operators.md and onnxOpImporters.cpp), which 10.3 includes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TENSORRT_10", "TENSORRT_11", "OnnxParser"]

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}

# by element types of what an operator reads; INT8 and narrower tensors are a matter of quantizers alone
_OF_FLOATS = (
    "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
    "DeformConv Dropout Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample "
    "GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LRN LayerNormalization LeakyRelu "
    "Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization Mish NonZero PRelu Pow Reciprocal "
    "Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"
)
_OF_NUMBERS = (
    "Abs Add ArgMax ArgMin CumSum DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min "
    "Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
)
_OF_ANY = (
    "And Cast CastLike Concat Constant ConstantOfShape Expand EyeLike Flatten GRU Gather GatherElements GatherND "
    "Identity If LSTM Loop NonMaxSuppression Not OneHot Or RNN RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike Reshape ReverseSequence RoiAlign Scan Shape Size Slice Split Squeeze Tile Transpose Trilu "
    "Unsqueeze Where Xor"
)
_OPERATORS_10 = {
    **dict.fromkeys(_OF_FLOATS.split(), _FLOATS),
    **dict.fromkeys(_OF_NUMBERS.split(), _NUMBERS),
    **dict.fromkeys(_OF_ANY.split(), _ANY),
}
_CONSTANT_INPUTS = {
    "CumSum": (1,),
    "OneHot": (1,),
    "Pad": (3,),
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    **{name: (1,) for name in _OPERATORS_10 if name.startswith("Reduce")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxParser:
    """One generation of TensorRT's ONNX parser.

    Attributes:
        name: for messages.
        operators: element types by operator.
        constant_inputs: positions of inputs that must be constants, by operator.
        quantized: element types that a quantizer may produce.
        dequantize_output_dtype: whether DequantizeLinear may have that attribute.
        group_norm_opset: the highest opset whose GroupNormalization is taken; its scale and bias changed in 21.
        custom_operators: whether the operators that begin with ``TRT_`` are known.
    """

    name: str
    operators: Mapping[str, frozenset[str]]
    constant_inputs: Mapping[str, tuple[int, ...]]
    quantized: frozenset[str]
    dequantize_output_dtype: bool
    group_norm_opset: int
    custom_operators: bool


TENSORRT_10 = OnnxParser(
    name="the ONNX parser of TensorRT 10.3",
    operators=_OPERATORS_10,
    constant_inputs=_CONSTANT_INPUTS,
    quantized=frozenset({"INT8", "INT4", "FLOAT8E4M3FN"}),
    # it compares the attribute with the type of the zero point, whichever way a quantizer goes
    dequantize_output_dtype=False,
    group_norm_opset=20,
    custom_operators=False,
)

TENSORRT_11 = OnnxParser(
    name="the ONNX parser of TensorRT 11",
    operators={
        **_OPERATORS_10,
        **dict.fromkeys(("Attention", "RMSNormalization", "RotaryEmbedding", "Swish"), _ANY),
    },
    constant_inputs=_CONSTANT_INPUTS,
    quantized=frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}),
    dequantize_output_dtype=True,
    group_norm_opset=25,
    custom_operators=True,
)
