"""Networks with dynamic dimensions are checked at every end of every profile, not at their best size alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qdexport.check.exact import exact_predictions
from qdexport.check.noise_floor import noise_floor
from qdexport.check.parity import end_to_end, layer_parity
from qdexport.check.verdict import layer_problems
from qdexport.core.io_spec import End, IoSpec
from qdexport.core.results import ShapeParity
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.attach import QuantizedModel

__all__ = ["ShapePoint", "call_at", "calls_at_shapes", "shape_parity", "shape_points"]

OnProgress = Callable[[int, int], None]
_ENDS: tuple[End, ...] = ("low", "best", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePoint:
    """A shape that is checked: one end of an optimization profile, and the size of every dynamic dimension there."""

    profile: str
    end: End
    sizes: dict[str, int]

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return f"at {sizes} (profile {self.profile}, {self.end})"


def shape_points(io: IoSpec) -> list[ShapePoint]:
    """The smallest, usual and largest shape of every profile, each shape once; none for fixed shapes."""
    points: list[ShapePoint] = []
    for profile in io.optimization_profiles():
        for end in _ENDS:
            sizes = profile.sizes(end)
            if all(point.sizes != sizes for point in points):
                points.append(ShapePoint(profile=profile.name, end=end, sizes=sizes))
    return points


def call_at(call: DenoiserCall, io: IoSpec) -> DenoiserCall:
    """A recorded denoiser call in other sizes: every axis is cut, or begins again, as far as it has to.

    Args:
        call: of any sizes; the first token of its text stays the first.
        io: the inputs at fixed sizes (:meth:`qdexport.core.io_spec.IoSpec.at`).
    """
    fitted: dict[str, Tensor] = {}
    for spec in io.inputs:
        tensor = call.inputs[spec.name]
        for axis, size in enumerate(spec.shape()):
            if tensor.shape[axis] != size:
                tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        fitted[spec.name] = tensor.to(getattr(torch, spec.dtype))
    return replace(call, inputs=fitted)


def calls_at_shapes(io: IoSpec, calls: Sequence[DenoiserCall]) -> list[tuple[ShapePoint, DenoiserCall]]:
    """Every shape of :func:`shape_points` with a call of its sizes; the shapes take the calls in turn."""
    points = enumerate(shape_points(io))
    return [(point, call_at(calls[index % len(calls)], io.at(point.sizes))) for index, point in points]


def shape_parity(
    model: QuantizedModel,
    onnx_path: Path,
    io: IoSpec,
    calls: Sequence[DenoiserCall],
    on_progress: OnProgress | None = None,
) -> tuple[list[ShapeParity], list[DenoiserCall]]:
    """Compares every quantized layer, and the whole network, at every shape of :func:`shape_points`.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file.
        io: its inputs, with ranges.
        calls: recorded calls of any size; the shapes take them in turn.
        on_progress: called with the shapes done and their total.

    Returns:
        One entry per shape, and the calls that were compared, for golden files.

    Raises:
        ParityError: the file does not run at one of the shapes.
    """
    found, used = [], []
    points = calls_at_shapes(io, calls)
    for index, (point, call) in enumerate(points):
        fixed = io.at(point.sizes)
        layers = layer_parity(model, onnx_path, fixed, [call])
        exact = exact_predictions(model.denoiser, [call.inputs])
        found.append(
            ShapeParity(
                profile=point.profile,
                end=point.end,
                sizes=point.sizes,
                timestep=call.timestep,
                layers=len(layers),
                sqnr_db=min(item.sqnr_db for item in layers),
                code_flip_rate=max(item.code_flip_rate for item in layers),
                whole_sqnr_db=end_to_end(model, onnx_path, fixed, [call], exact)[0],
                noise_floor_db=noise_floor(model, fixed, [call], seeds=1, exact=exact)[0],
                problems=layer_problems(layers, model.body),
            )
        )
        used.append(call)
        if on_progress is not None:
            on_progress(index + 1, len(points))
    return found, used
