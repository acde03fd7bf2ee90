"""Types of numbers by the names that recipes, plans and reports use: how wide each is, and what libraries call it."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["BODIES", "BYTES", "INT8_MAX", "INT8_MIN", "LARGEST", "NUMPY", "ONNX", "Body", "LayerKind"]

Body = Literal["fp32", "fp16"]  # what everything that is not quantized is computed in
LayerKind = Literal["conv", "linear"]

# of one number
BYTES: Final = {
    "int4": 0.5, "nvfp4": 0.5, "int8": 1.0, "uint8": 1.0, "bool": 1.0, "fp8": 1.0, "fp16": 2.0, "bf16": 2.0,
    "fp32": 4.0, "int32": 4.0, "int64": 8.0,
}  # fmt: skip
# PyTorch's names, too
NUMPY: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ONNX: Final = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
BODIES: Final[tuple[Body, ...]] = ("fp32", "fp16")
# finite number
LARGEST: Final = {"fp16": 65504.0, "fp32": 3.4028234663852886e38}
INT8_MIN, INT8_MAX = -128, 127
