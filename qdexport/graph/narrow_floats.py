"""Rounding to E4M3 (FP8) and E2M1 (FP4), and NVFP4's blocks, in numpy."""

from __future__ import annotations

from typing import cast

import ml_dtypes
import numpy as np

from qdexport.core.spec import NVFP4_BLOCK

__all__ = ["e2m1_round", "e4m3_round", "nvfp4_codes"]

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


def e4m3_round(values: np.ndarray) -> np.ndarray:
    """The nearest E4M3 numbers, half to even; beyond 448 the largest; FP32."""
    codes = np.clip(values, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return cast("np.ndarray", codes.astype(np.float32))


def e2m1_round(values: np.ndarray) -> np.ndarray:
    """The nearest E2M1 numbers, half to even; beyond 6 the largest; FP32."""
    codes = np.clip(values, -_E2M1_MAX, _E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
    return cast("np.ndarray", codes.astype(np.float32))


def nvfp4_codes(x: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NVFP4 along the last axis: codes ``e2m1(x / (b scale))``, and ``b = e4m3(max |x| / 6 / scale)`` of blocks of 16.

    Args:
        x: ``[..., K]``, K a multiple of 16.
        scale: of the tensor, FP32, one element.

    Returns:
        FP32 codes like ``x``, 0 where ``b`` is 0, and FP32 block scales ``[..., K / 16]``.
    """
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    step = np.float32(scale.reshape(-1)[0])
    narrow = e4m3_round(np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(_E2M1_MAX) / step)
    wide = narrow * step
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(wide > 0, e2m1_round(blocks / wide), np.float32(0))
    return codes.reshape(x.shape), narrow[..., 0]
