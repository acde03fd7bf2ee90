"""The inputs and outputs of a captured denoiser."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["SHARED_ROLES", "Dim", "IoSpec", "TensorSpec"]

Role = Literal[
    "sample",
    "timestep",
    "text",
    "text_mask",
    "text_pooled",
    "time_ids",
    "image_size",
    "class_labels",
    "guidance",
    "position_ids",
    "residual",
    "prediction",
]
# inputs without a row per sample: the whole call shares them
SHARED_ROLES: Final[frozenset[Role]] = frozenset({"timestep", "position_ids"})


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
    """All inputs and outputs of a denoiser, in call order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def by_role(self, role: Role) -> TensorSpec | None:
        """The input with a role, or None."""
        return next((spec for spec in self.inputs if spec.role == role), None)
