"""The quantized dialect between capture and lowering: one operator, ``qdexport::FakeQuantize``."""

from __future__ import annotations

import onnx

__all__ = [
    "CHANNEL_SCALE",
    "CODE_FORMAT",
    "DOMAIN",
    "FAKE_QUANTIZE",
    "FORM_KEY",
    "LAYER_KEY",
    "LOG2_ZERO",
    "NO_AXIS",
    "SCALED_FOR_KEY",
    "SEQUENCE_FIRST_KEY",
    "STEP_ROWS",
    "VERSION",
    "register_schema",
]

DOMAIN = "qdexport"
FAKE_QUANTIZE = "FakeQuantize"
CODE_FORMAT = "form"
VERSION = 1
NO_AXIS = -1

# metadata of a node: the path of the torch module that it came from
LAYER_KEY = "qdexport.module"
# metadata of a convolution or product whose output carries another layer's 1 / r: `<layer>:<first channel>`
SCALED_FOR_KEY = "qdexport.scaled_for"
# metadata of a product that reads tokens as [length, batch, width] where torch has [batch, length, width]
SEQUENCE_FIRST_KEY = "qdexport.sequence_first"
# metadata of a node that stands for an operator of several forms: `[operator, signature]` in JSON
FORM_KEY = "qdexport.form"
# a layer's module that multiplies its input with 1 / r
CHANNEL_SCALE = "channel_scale"
# logarithmic codes from here on stand for 0: FP32 holds smaller powers as subnormal numbers only, which GPUs flush
LOG2_ZERO = 126
# the module that looks the activation rows of a timestep up
STEP_ROWS = "step_rows"

_DOC = """Affine fake quantization in FP32, round half to even:
y = (clip(rint(x / scale[row]) + zero_point[row], qmin, qmax) - zero_point[row]) * scale[row].
scale and zero_point are [R] (per tensor), [R, C] (C channels along axis), or [1, C, B] (a weight [C, K] with B blocks
along its last axis); row is INT64 [1] or [N], absent when
R = 1. Where mode[row] is 1 the quantizer is logarithmic instead: y = scale[row] * 2^-q with
q = clip(rint(-log2(x / scale[row])), 0, qmax), and y = 0 for the top code, codes from 126 on, and x <= 0.
form fp8: y = e4m3(x / scale) * scale, half to even, saturating at 448. form nvfp4: y = e2m1(x / (b scale)) * (b scale)
with b = e4m3(max |x| / 6 / scale) for each 16 numbers along the last axis, and y = 0 where b is 0."""


def register_schema() -> None:
    """Makes the operator known to onnx, so that exporters, checkers and shape inference accept it. Idempotent."""
    if onnx.defs.has(FAKE_QUANTIZE, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    onnx.defs.register_schema(
        schema(
            FAKE_QUANTIZE,
            DOMAIN,
            VERSION,
            doc=_DOC,
            inputs=[
                schema.FormalParameter("x", "T", "a floating-point tensor"),
                schema.FormalParameter("scale", "tensor(float)", "positive"),
                schema.FormalParameter("zero_point", "tensor(float)", "integer valued"),
                schema.FormalParameter(
                    "row", "tensor(int64)", "table row", param_option=schema.FormalParameterOption.Optional
                ),
                schema.FormalParameter(
                    "mode", "tensor(float)", "0 affine, 1 log2; [R]", param_option=schema.FormalParameterOption.Optional
                ),
            ],
            outputs=[schema.FormalParameter("y", "T", "like x")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "floating point")],
            attributes=[
                schema.Attribute("qmin", onnx.defs.OpSchema.AttrType.INT, "smallest code"),
                schema.Attribute("qmax", onnx.defs.OpSchema.AttrType.INT, "largest code"),
                schema.Attribute("axis", onnx.defs.OpSchema.AttrType.INT, "channel axis, or -1"),
                schema.Attribute(CODE_FORMAT, onnx.defs.OpSchema.AttrType.STRING, "int, fp8 or nvfp4", required=False),
            ],
        )
    )
