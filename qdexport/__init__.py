"""qdexport: compiles quantized diffusion models for NVIDIA hardware."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
