"""Peak rates of NVIDIA GPUs, for predictions that need none of them.

All rates are dense (without sparsity) and at boost clocks; matrix rates are those with FP32 accumulation where a data
sheet has two. What a data sheet does not print is derived, and the comment says from what.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdexport.errors import RecipeError

__all__ = ["GPUS", "Gpu", "gpu_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peak rates of one GPU, dense.

    Attributes:
        name: the marketing name.
        capability: compute capability.
        int8: INT8 operations per second (a multiply-accumulate is two).
        fp16: FP16 tensor-core operations per second with FP32 accumulation; TF32 has half of it on all in the table.
        bandwidth: bytes per second of device memory.
        fp8: FP8 operations per second; None when its tensor cores have no FP8.
        nvfp4: likewise for FP4.
    """

    name: str
    capability: str
    int8: float
    fp16: float
    bandwidth: float
    fp8: float | None = None
    nvfp4: float | None = None

    def rate(self, dtype: str) -> float:
        """Operations per second of matrix products in a plan's type (``int8``, ``fp16``, ``fp32`` as TF32, ...).

        Raises:
            RecipeError: its tensor cores do not have this type.
        """
        rates = {
            "int4": self.int8,  # 4-bit weights are widened: the product is one of INT8
            "int8": self.int8,
            "fp8": self.fp8,
            "nvfp4": self.nvfp4,
            "fp16": self.fp16,
            "bf16": self.fp16,
            "fp32": self.fp16 / 2,  # TF32
        }
        rate = rates.get(dtype)
        if rate is None:
            raise RecipeError(f"{self.name} (compute capability {self.capability}) has no matrix products in {dtype}")
        return rate


GPUS: dict[str, Gpu] = {
    # NVIDIA Ampere GA102 GPU architecture whitepaper, table of GeForce RTX 3090
    "rtx-3090": Gpu(name="RTX 3090", capability="8.6", int8=284e12, fp16=71e12, bandwidth=936e9),
    # NVIDIA Ada GPU architecture whitepaper, table of GeForce RTX 4090
    "rtx-4090": Gpu(name="RTX 4090", capability="8.9", int8=660.6e12, fp16=165.2e12, fp8=330.3e12, bandwidth=1008e9),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, table of GeForce RTX 5090
    "rtx-5090": Gpu(
        name="RTX 5090",
        capability="12.0",
        int8=838e12,
        fp16=209.5e12,
        fp8=419e12,
        nvfp4=1676e12,
        bandwidth=1792e9,
    ),
    # NVIDIA A100 Tensor Core GPU datasheet, SXM, 40 GB
    "a100": Gpu(name="A100", capability="8.0", int8=624e12, fp16=312e12, bandwidth=1555e9),
    # NVIDIA H100 Tensor Core GPU architecture whitepaper, SXM5; bandwidth of the 80 GB product
    "h100": Gpu(name="H100", capability="9.0", int8=1978.9e12, fp16=989.4e12, fp8=1978.9e12, bandwidth=3350e9),
    # Jetson AGX Orin series technical brief, 64 GB: the GPU's 170 sparse INT8 TOPS halved, FP16 half of that;
    # its two deep-learning accelerators are not counted
    "orin": Gpu(name="Jetson AGX Orin 64 GB", capability="8.7", int8=85e12, fp16=42.5e12, bandwidth=204.8e9),
    # Jetson T5000 module data: 2,070 sparse FP4 TFLOPS halved; every doubling of the width halves it again, and INT8 is
    # taken to run at the rate of FP8 (both derived, not printed)
    "thor": Gpu(
        name="Jetson AGX Thor (T5000)",
        capability="11.0",
        int8=517.5e12,
        fp16=258.8e12,
        fp8=517.5e12,
        nvfp4=1035e12,
        bandwidth=273e9,
    ),
}


def gpu_named(name: str) -> Gpu:
    """Looks a GPU up.

    Raises:
        RecipeError: the table does not have it.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise RecipeError(f"unknown GPU {name!r}; the table has {', '.join(GPUS)}")
    return gpu
