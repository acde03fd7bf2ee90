"""PyTorch's types by the names that recipes use."""

from __future__ import annotations

import torch

from qdexport.core.precision import NUMPY

__all__ = ["torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The type called ``fp32``, ``fp16`` or ``bf16``."""
    dtype: torch.dtype = getattr(torch, NUMPY[name])
    return dtype
