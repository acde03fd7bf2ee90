"""The inputs and outputs of a captured network: the denoiser, or one that works beside it."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from qdexport.errors import ModelError

__all__ = ["SHARED_ROLES", "Dim", "End", "IoSpec", "Profile", "ProfileShapes", "TensorSpec"]

End = Literal["low", "best", "high"]
ProfileShapes = dict[str, list[list[int]]]
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
    # of the networks beside the denoiser
    "tokens",
    "latents",
    "image",
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


class Profile(BaseModel):
    """One optimization profile: the dynamic dimensions, by name, and the sizes that its kernels are made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dims: tuple[Dim, ...]

    def sizes(self, which: End) -> dict[str, int]:
        """The sizes at one end of the ranges, by the dimension's name."""
        return {dim.name: getattr(dim, which) for dim in self.dims}


class TensorSpec(BaseModel):
    """One network input or output; ``dtype`` is numpy's name (float32, float16, int64)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Role
    dtype: str
    dims: tuple[Dim, ...]

    def shape(self, which: End = "best") -> tuple[int, ...]:
        """The concrete shape at one end of the ranges."""
        return tuple(getattr(dim, which) for dim in self.dims)


class IoSpec(BaseModel):
    """All inputs and outputs of a network, in call order, and the optimization profiles of its dynamic dimensions.

    Without profiles of its own, a network with dynamic dimensions has one, of their whole ranges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...] = ()

    def by_role(self, role: Role) -> TensorSpec | None:
        """The input with a role, or None."""
        return next((spec for spec in self.inputs if spec.role == role), None)

    @property
    def dynamic_dims(self) -> tuple[Dim, ...]:
        """The dynamic dimensions of the inputs, each once."""
        return tuple(dict.fromkeys(dim for spec in self.inputs for dim in spec.dims if dim.dynamic))

    def optimization_profiles(self) -> tuple[Profile, ...]:
        """The profiles; one of the whole ranges where none is named; none for a network of fixed shapes."""
        whole = self.dynamic_dims
        return self.profiles or ((Profile(name="0", dims=whole),) if whole else ())

    def profile_shapes(self) -> dict[str, ProfileShapes]:
        """By profile and dynamic input: the smallest, usual and largest shape."""
        return {
            profile.name: {
                spec.name: [list(spec.shape(end)) for end in ("low", "best", "high")]
                for spec in self.within(profile).inputs
                if any(dim.name in profile.sizes("best") for dim in spec.dims)
            }
            for profile in self.optimization_profiles()
        }

    def within(self, profile: Profile) -> IoSpec:
        """The same tensors with the ranges of one profile."""
        return self._replaced({dim.name: dim for dim in profile.dims})

    def at(self, sizes: dict[str, int]) -> IoSpec:
        """The same tensors with fixed sizes.

        Args:
            sizes: by the dimension's name; the others have their best size.

        Raises:
            ModelError: a size lies outside the range that the network has.
        """
        for dim in self.dynamic_dims:
            if not dim.low <= sizes.get(dim.name, dim.best) <= dim.high:
                raise ModelError(f"{dim.name} {sizes[dim.name]} is outside the network's range {dim.low} to {dim.high}")
        fixed = {name: Dim(name=name, low=size, best=size, high=size) for name, size in sizes.items()}
        best = {dim.name: Dim(name=dim.name, low=dim.best, best=dim.best, high=dim.best) for dim in self.dynamic_dims}
        return self._replaced({**best, **fixed})

    def _replaced(self, dims: dict[str, Dim]) -> IoSpec:
        def of(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                spec.model_copy(update={"dims": tuple(dims.get(dim.name, dim) for dim in spec.dims)}) for spec in specs
            )

        return IoSpec(inputs=of(self.inputs), outputs=of(self.outputs))
