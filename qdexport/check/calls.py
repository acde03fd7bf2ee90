"""The denoiser calls on which a model is checked: the real sampler's inputs, or random ones without a sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from qdexport.core.io_spec import IoSpec
from qdexport.errors import ParityError
from qdexport.models.denoiser import call_denoiser, example_inputs
from qdexport.models.sampling import (
    DenoiserCall,
    NamedDenoiser,
    OnProgress,
    SampleRequest,
    prompts_for,
    record_calls,
)

__all__ = ["check_calls", "fake_quant_denoiser", "fit_inputs", "row_chunks", "spread"]

_T = TypeVar("_T")


def check_calls(
    qm: Any, io: IoSpec, count: int, seed: int, on_progress: OnProgress | None = None
) -> list[DenoiserCall]:
    """Denoiser calls at ``count`` timesteps of the model's schedule, the first and the last among them.

    With a pipeline, the inputs are those of the fake-quant model's own sampling run; else they are random.

    Args:
        qm: the fake-quant model.
        io: the exported network's inputs; the calls have its dtypes and its best sizes.
        count: how many, 2 at least; fewer when the schedule is shorter.
        seed: of the prompts and the noise.
        on_progress: called after each denoiser call with the calls done and their total.

    Returns:
        Calls from the noisiest timestep on, ready for PyTorch and ONNX alike.
    """
    if qm.loaded.pipeline is None:
        return [
            DenoiserCall(step=step, timestep=timestep, inputs=_random_inputs(io, timestep, seed), batch=0)
            for step, timestep in spread(list(enumerate(_timesteps(qm))), count)
        ]
    sample = io.inputs[0].shape()
    rows = sample[0]
    images = max(1, rows // 2) if qm.loaded.defaults.cfg else rows
    request = SampleRequest(
        prompts=tuple(prompts_for(qm.loaded, images, seed)),
        seed=seed,
        steps=qm.recipe.calibration.steps,
        batch_size=images,
        height=sample[2],
        width=sample[3],
    )
    recorded = record_calls(qm.loaded, request, denoiser=fake_quant_denoiser(qm), on_progress=on_progress)
    first = {
        call.step: call for call in reversed(recorded)
    }  # samplers of higher order call twice at a timestep
    return [
        DenoiserCall(
            step=call.step, timestep=call.timestep, inputs=fit_inputs(call.inputs, io), batch=call.batch
        )
        for call in spread([first[step] for step in sorted(first)], count)
    ]


def fake_quant_denoiser(qm: Any) -> NamedDenoiser:
    """The fake-quant denoiser for a pipeline of another dtype: inputs and prediction are converted."""

    def predict(inputs: dict[str, Tensor]) -> Tensor:
        body = next(qm.denoiser.parameters()).dtype
        converted = {
            name: tensor.to(body) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
        }
        return call_denoiser(qm.denoiser, converted).to(inputs["sample"].dtype)

    return NamedDenoiser(predict, qm.denoiser)


def fit_inputs(inputs: Mapping[str, Tensor], io: IoSpec) -> dict[str, Tensor]:
    """One call in the exported network's dtypes, with as many rows as it takes; further rows are left out.

    Raises:
        ParityError: an input of the network is missing.
    """
    missing = [spec.name for spec in io.inputs if spec.name not in inputs]
    if missing:
        raise ParityError(f"a recorded call lacks {', '.join(missing)}; it has {', '.join(inputs)}")
    typed = {spec.name: inputs[spec.name].to(getattr(torch, spec.dtype)) for spec in io.inputs}
    part, _ = next(row_chunks(typed, io))
    return part


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
    by_row = [spec.name for spec in io.inputs if spec.role != "timestep"]
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


def _timesteps(qm: Any) -> list[int]:
    return [int(step) for step in qm.timesteps] or [999, 500, 1]


def _random_inputs(io: IoSpec, timestep: int, seed: int) -> dict[str, Tensor]:
    inputs = example_inputs(io, seed + timestep)
    return {**inputs, "timestep": torch.tensor([timestep])}
