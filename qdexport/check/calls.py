"""The denoiser calls on which a model is checked: a real sampler's inputs, or random ones without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qdexport.check.exact import exact_call
from qdexport.core.io_spec import SHARED_ROLES, IoSpec, TensorSpec
from qdexport.core.network_facts import no_fractions
from qdexport.core.timesteps import whole_step
from qdexport.errors import ModelError, ParityError
from qdexport.models.denoiser import example_inputs
from qdexport.models.denoiser_calls import MID_RESIDUAL
from qdexport.models.sampling import (
    DenoiserCall,
    NamedDenoiser,
    OnProgress,
    SampleRequest,
    prompts_for,
    record_calls,
    sample,
)
from qdexport.quant.attach import QuantizedModel

__all__ = [
    "check_calls",
    "fake_quant_denoiser",
    "first_call",
    "fit_inputs",
    "row_chunks",
    "sample_size",
    "spread",
    "typed_inputs",
]

_T = TypeVar("_T")


def check_calls(
    model: QuantizedModel,
    io: IoSpec,
    count: int,
    seed: int,
    on_progress: OnProgress | None = None,
    batches: int = 1,
) -> list[DenoiserCall]:
    """Denoiser calls at ``count`` timesteps of the model's schedule, the first and the last among them.

    With a pipeline, the inputs are those of the fake-quant model's own sampling run; else they are random, but for the
    text's first token where it is a constant.

    Args:
        model: the fake-quant model.
        io: the exported network's inputs; the calls have its dtypes and its best sizes.
        count: how many timesteps; fewer when the schedule is shorter.
        seed: of the prompts and the noise.
        on_progress: called after each denoiser call with the calls done and their total.
        batches: sampling runs, each with prompts and noise of its own; of each, a call at every chosen timestep
            is kept.

    Returns:
        Calls ready for PyTorch and ONNX alike, run by run, from the noisiest timestep on.
    """
    if model.loaded.pipeline is None:
        calls = [
            _random_call(io, step, timestep, batch, seed)
            for batch in range(batches)
            for step, timestep in spread(list(enumerate(_timesteps(model))), count)
        ]
        for call in calls:
            if model.bos is not None:  # a network with a constant for the first token answers no other one
                call.inputs["encoder_hidden_states"][:, 0] = model.bos.embedding
        return calls
    shape = io.inputs[0].shape()
    images = max(1, shape[0] // 2) if model.loaded.defaults.cfg else shape[0]
    request = SampleRequest(
        prompts=tuple(prompts_for(model.loaded, images * batches, seed)),
        seed=seed,
        steps=model.recipe.calibration.steps,
        guidance_scale=model.recipe.calibration.guidance_scale,
        batch_size=images,
        **sample_size(io),
    )
    recorded = record_calls(
        model.loaded, request, denoiser=fake_quant_denoiser(model), on_progress=on_progress
    )
    # samplers of higher order call twice at a timestep: the first call counts
    first = {(call.batch, call.step): call for call in reversed(recorded)}
    steps = spread(sorted({call.step for call in recorded}), count)
    chosen = [first[batch, step] for batch in range(batches) for step in steps]
    return [replace(call, inputs=fit_inputs(call.inputs, io)) for call in chosen]


class _Enough(Exception):  # noqa: N818  no error: it ends a sampling run early
    """The first call has been seen."""


def first_call(model: QuantizedModel, io: IoSpec) -> dict[str, Tensor]:
    """The first denoiser call of the model's own sampler; random inputs without a pipeline. The denoiser does not run.

    Args:
        model: the fake-quant model.
        io: the exported network's inputs, whose types the call has.
    """
    if model.loaded.pipeline is None:
        return check_calls(model, io, 1, 0)[0].inputs
    seen: list[dict[str, Tensor]] = []

    def stop(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs)
        raise _Enough

    shape = io.inputs[0].shape()
    images = max(1, shape[0] // 2) if model.loaded.defaults.cfg else shape[0]
    request = SampleRequest(
        prompts=tuple(prompts_for(model.loaded, images, 0)),
        seed=0,
        steps=model.recipe.calibration.steps,
        guidance_scale=model.recipe.calibration.guidance_scale,
        batch_size=images,
        **sample_size(io),
    )
    with contextlib.suppress(_Enough):
        sample(model.loaded, request, denoiser=NamedDenoiser(stop, model.loaded.denoiser))
    return fit_inputs(seen[0], io)


def fake_quant_denoiser(model: QuantizedModel) -> NamedDenoiser:
    """The fake-quant denoiser, computed in FP32, for a pipeline of any dtype."""

    def predict(inputs: dict[str, Tensor]) -> Tensor:
        return exact_call(model.denoiser, inputs).to(inputs["sample"].dtype)

    return NamedDenoiser(predict, model.denoiser)


def fit_inputs(inputs: Mapping[str, Tensor], io: IoSpec) -> dict[str, Tensor]:
    """One call in the exported network's dtypes, with as many rows as it takes; further rows are left out.

    Raises:
        ParityError: an input of the network is missing, or the call has residuals that the network has no input for.
    """
    part, _ = next(row_chunks(typed_inputs(inputs, io), io))
    return part


def typed_inputs(inputs: Mapping[str, Tensor], io: IoSpec) -> dict[str, Tensor]:
    """One call in the exported network's dtypes.

    A call without the residuals of a ControlNet has zeros, which is the same.

    Raises:
        ModelError: the timestep is a fraction, and the network's a whole number.
        ParityError: an input of the network is missing, or the call has residuals that the network has no input for.
    """
    if MID_RESIDUAL in inputs and all(spec.role != "residual" for spec in io.inputs):
        raise ParityError(
            "the call has the residuals of a ControlNet, and the exported network no inputs for them; "
            "compile it with shapes.controlnet: true"
        )
    missing = [spec.name for spec in io.inputs if spec.name not in inputs and spec.role != "residual"]
    if missing:
        raise ParityError(f"a recorded call lacks {', '.join(missing)}; it has {', '.join(inputs)}")
    rows = inputs[io.inputs[0].name].shape[0]
    return {
        spec.name: _typed(inputs[spec.name], spec) if spec.name in inputs else _zeros(spec, rows) for spec in io.inputs
    }


def _typed(tensor: Tensor, spec: TensorSpec) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.role == "timestep" and tensor.is_floating_point() and not dtype.is_floating_point:
        whole = whole_step(tensor.item())
        if whole is None:
            raise ModelError(no_fractions([tensor.item()]))
        return torch.full_like(tensor, whole, dtype=dtype)
    return tensor.to(dtype)


def _zeros(spec: TensorSpec, rows: int) -> Tensor:
    return torch.zeros((rows, *spec.shape()[1:]), dtype=getattr(torch, spec.dtype))


def row_chunks(inputs: Mapping[str, Tensor], io: IoSpec) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Splits a call into calls of as many rows as the network takes; the last row is repeated to fill one.

    Args:
        inputs: tensors with one row per sample, and the timestep.
        io: says how many rows the network takes.

    Yields:
        A call, and how many of its rows count.
    """
    batch = io.inputs[0].dims[0]
    rows = inputs[io.inputs[0].name].shape[0]
    by_row = [spec.name for spec in io.inputs if spec.role not in SHARED_ROLES]
    for start in range(0, rows, batch.high):
        count = min(batch.high, rows - start)
        padded = max(count, batch.low)
        index = torch.arange(start, start + padded).clamp_(max=start + count - 1)
        yield {name: tensor[index] if name in by_row else tensor for name, tensor in inputs.items()}, count


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """``count`` items at even distances, the first and the last among them; all of a shorter list."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def sample_size(io: IoSpec) -> dict[str, int]:
    """Height and width of the sample; none for FLUX's tokens, whose model has the exported size as its own."""
    shape = io.inputs[0].shape()
    return {"height": shape[2], "width": shape[3]} if len(shape) == 4 else {}


def _timesteps(model: QuantizedModel) -> list[float]:
    return list(model.timesteps) or [999, 500, 1]


def _random_call(io: IoSpec, step: int, timestep: float, batch: int, seed: int) -> DenoiserCall:
    inputs = example_inputs(io, 10_000 * (seed + batch) + int(timestep))
    inputs["timestep"] = torch.tensor([timestep], dtype=inputs["timestep"].dtype)
    return DenoiserCall(step=step, timestep=timestep, inputs=inputs, batch=batch)
