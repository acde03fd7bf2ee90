"""The inputs and outputs of a captured network: the denoiser, or one that works beside it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Dim", "IoSpec", "TensorSpec"]

Role = Literal[
    "sample", "timestep", "text", "text_pooled", "time_ids", "class_labels", "prediction",
    "tokens", "latents", "image",
]  # fmt: skip


class Dim(BaseModel):
    """One dimension: fixed when ``low == high``, else a named range for dynamic shapes and their profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    low: int
    best: int
    high: int

    @property
    def dynamic(self) -> bool:
        """Whether the dimension may change at run time."""
        return self.low != self.high


class TensorSpec(BaseModel):
    """One network input or output; ``dtype`` is numpy's name (float32, float16, int64)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Role
    dtype: str
    dims: tuple[Dim, ...]

    def shape(self, which: Literal["low", "best", "high"] = "best") -> tuple[int, ...]:
        """The concrete shape at one end of the ranges."""
        return tuple(getattr(dim, which) for dim in self.dims)


class IoSpec(BaseModel):
    """All inputs and outputs of a network, in call order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def by_role(self, role: Role) -> TensorSpec | None:
        """The input with a role, or None."""
        return next((spec for spec in self.inputs if spec.role == role), None)
