"""The networks beside the denoiser: each against PyTorch on real inputs, and images of the whole pipeline.

The truth is the network in FP32 with the weights of the file. Beside the ONNX file's distance from it stands the noise
floor, the distance of the PyTorch network whose every operator rounds its output stochastically (up or down, so that
the mean is exact) to the type of the body. Rounding to nearest has half the variance of that, so a right file is some
3 dB better than its floor, less what the order of operators costs. In float64, where nothing is rounded, file and
network are one function, module by module: what rounding would hide is found there, and named.

The whole pipeline is held against the same pipeline whose text encoders and VAE decoder are the FP32 ones: the denoiser
is the ONNX file on both sides, which was judged apart. The floor is again the images of rounding networks. A rounding
can flip a code in the denoiser, from which on two images differ by more than rounding; that happens on both sides by
chance, so medians are compared, with a margin for two medians of few images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from qdexport.check.calls import row_chunks
from qdexport.check.exact import in_float32
from qdexport.check.float64.companion import companion_differences
from qdexport.check.measure import WORST_DB, sqnr_db
from qdexport.check.noise_floor import rounding
from qdexport.check.peaks import Peaks
from qdexport.check.session import REFERENCE, ort_errors, reference_session
from qdexport.core.companion_facts import CompanionFacts
from qdexport.core.precision import LARGEST
from qdexport.core.results import CompanionParity, WholePipeline
from qdexport.errors import ParityError
from qdexport.models.companions import Companion
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import SampleRequest, call_count, sample, schedule
from qdexport.models.stand_ins import NamedFunction, in_place_of_parts

__all__ = ["OnnxCompanion", "PipelineTrial", "companion_parity", "exact_function", "try_pipeline"]

OnProgress = Callable[[int, int], None]
Call = dict[str, Tensor]
# as for the denoiser
_FLOOR_MARGIN_DB: Final = 1.0
# medians over a few images whose errors scatter by some 3 dB (one standard deviation), on both sides
_IMAGES_MARGIN_DB: Final = 6.0
_PEAK: Final = 2.0  # images lie in [-1, 1]
_TRIALS: Final = 3
_NAMED: Final = 3


class OnnxCompanion:
    """Runs an ONNX file in ONNX Runtime; rows are split and padded to what it takes.

    Args:
        path: the emitted file.
        facts: what it says about itself.
    """

    def __init__(self, path: Path, facts: CompanionFacts) -> None:
        self.path, self._facts = path, facts
        self._session = reference_session(path)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named outputs.

        Raises:
            ParityError: the inputs do not fit the file.
        """
        io = self._facts.io
        typed = {spec.name: inputs[spec.name].to(getattr(torch, spec.dtype)) for spec in io.inputs}
        parts = [[item[:count] for item in self._run(part)] for part, count in row_chunks(typed, io)]
        return {spec.name: torch.cat(items) for spec, items in zip(io.outputs, zip(*parts, strict=True), strict=True)}

    def _run(self, inputs: Call) -> list[Tensor]:
        feed = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            return [torch.from_numpy(array) for array in self._session.run(None, feed)]
        except ort_errors() as error:
            raise ParityError(f"{self.path} does not run: {str(error).splitlines()[0]}") from error


@dataclass(slots=True)
class PipelineTrial:
    """What sampling with all networks gave.

    Attributes:
        result: images of the ONNX files beside the floor.
        calls: inputs of every call of a network, by network.
    """

    result: WholePipeline
    calls: dict[str, list[Call]] = field(default_factory=dict)


def try_pipeline(
    loaded: LoadedModel,
    request: SampleRequest,
    denoiser: Any,
    companions: Mapping[str, tuple[Companion, OnnxCompanion]],
    on_progress: OnProgress | None = None,
) -> PipelineTrial:
    """Samples with FP32 networks, with rounding ones, and with the ONNX files.

    Args:
        loaded: the model with its pipeline.
        request: prompts, noise and sampler settings.
        denoiser: stands for the pipeline's own in all three runs.
        companions: by name.
        on_progress: called with the denoiser calls done and their total.
    """
    total = call_count(loaded, request)
    calls: dict[str, list[Call]] = {name: [] for name in companions}
    source = torch.Generator().manual_seed(request.seed)

    def images(run: int, functions: Mapping[str, NamedFunction]) -> np.ndarray:
        def advance(done: int, _: int) -> None:
            if on_progress is not None:
                on_progress(run * total + done, _TRIALS * total)

        placed = {name: (companions[name][0].facts, function) for name, function in functions.items()}
        with in_place_of_parts(loaded.pipeline, placed):
            return sample(loaded, request, denoiser=denoiser, on_progress=advance)

    exact = images(0, {name: _recording(exact_function(item), calls[name]) for name, (item, _) in companions.items()})
    rounded = images(1, {name: _rounding_function(item, source) for name, (item, _) in companions.items()})
    compiled = images(2, {name: file for name, (_, file) in companions.items()})
    psnr, floor = _psnr(exact, compiled), _psnr(exact, rounded)
    reasons = []
    if not psnr >= floor - _IMAGES_MARGIN_DB:
        reasons.append(
            f"images of the whole pipeline: {psnr:.1f} dB to those of the networks in FP32, more than "
            f"{_IMAGES_MARGIN_DB:g} dB below the {floor:.1f} dB of mere rounding"
        )
    result = WholePipeline(
        networks=["denoiser", *companions],
        images=len(request.prompts),
        steps=len(schedule(loaded, request.steps)),
        psnr_db=psnr,
        noise_floor_db=floor,
        verdict="fail" if reasons else "pass",
        reasons=reasons,
    )
    return PipelineTrial(result=result, calls=calls)


def companion_parity(
    companion: Companion, file: OnnxCompanion, calls: Sequence[Call], most: int = 8
) -> CompanionParity:
    """One network's ONNX file against PyTorch, on calls of a sampling run; the first row of them in float64, too.

    Args:
        companion: the network.
        file: its ONNX file.
        calls: their inputs, of any number of rows; every row is a call of its own.
        most: rows that are compared.
    """
    rows = _distinct_rows(calls)[:most]
    exact, peak = exact_function(companion), Peaks(companion.network, companion.facts.body)
    distances: dict[str, tuple[list[float], list[float]]] = {
        spec.name: ([], []) for spec in companion.facts.io.outputs
    }
    for index, row in enumerate(rows):
        inputs = _typed(row, companion.facts)
        with peak.magnitudes():
            truth = exact(inputs)
        with peak.types():
            noisy = _rounding_function(companion, torch.Generator().manual_seed(index))(inputs)
        found = file(inputs)
        for name, (ours, floors) in distances.items():
            ours.append(sqnr_db(_array(truth[name]), _array(found[name])))
            floors.append(sqnr_db(_array(truth[name]), _array(noisy[name])))
    medians = [(statistics.median(ours), statistics.median(floors)) for ours, floors in distances.values()]
    sqnr, floor = min(medians, key=lambda pair: pair[0] - pair[1] if math.isfinite(pair[0]) else math.inf)
    first, _ = next(iter(row_chunks(_typed(rows[0], companion.facts), companion.facts.io)))
    differences, note = companion_differences(companion, file.path, first)
    reasons = [*differences[:_NAMED], *_reasons(companion.facts, sqnr, floor, peak)]
    return CompanionParity(
        reference=REFERENCE,
        calls=len(rows),
        sqnr_db=sqnr,
        noise_floor_db=floor,
        largest_activation=peak.value,
        float64_left_out=note,
        verdict="fail" if reasons else "pass",
        reasons=reasons,
    )


def exact_function(companion: Companion) -> NamedFunction:
    """The network in FP32, whatever its body; outputs are FP32, and rounded to their type when the body is FP32 too."""

    def function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        typed = _typed(inputs, companion.facts)
        single = {name: item.float() if item.is_floating_point() else item for name, item in typed.items()}
        with torch.no_grad(), in_float32(companion.module):
            outputs = companion.in_body(single)
        return _converted(outputs, companion.facts) if companion.facts.body == "fp32" else outputs

    return function


def _rounding_function(companion: Companion, source: torch.Generator) -> NamedFunction:
    def function(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with rounding(source):
            outputs = companion.in_body(_typed(inputs, companion.facts))
        return _converted(outputs, companion.facts)

    return function


def _converted(outputs: Mapping[str, Tensor], facts: CompanionFacts) -> dict[str, Tensor]:
    """In the types of the file's outputs, rounded to nearest."""
    return {spec.name: outputs[spec.name].to(getattr(torch, spec.dtype)) for spec in facts.io.outputs}


def _recording(function: NamedFunction, calls: list[Call]) -> NamedFunction:
    def recorded(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        calls.append({name: tensor.clone() for name, tensor in inputs.items()})
        return function(inputs)

    return recorded


def _typed(inputs: Mapping[str, Tensor], facts: CompanionFacts) -> Call:
    return {spec.name: inputs[spec.name].to(getattr(torch, spec.dtype)) for spec in facts.io.inputs}


def _distinct_rows(calls: Sequence[Call]) -> list[Call]:
    """Every row as a call of its own, without repetitions: every batch of a run encodes the same negative prompt."""
    found: dict[bytes, Call] = {}
    for call in calls:
        for index in range(next(iter(call.values())).shape[0]):
            row = {name: tensor[index : index + 1] for name, tensor in call.items()}
            found.setdefault(b"".join(_array(item).tobytes() for item in row.values()), row)
    return list(found.values())


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Median over images of the PSNR in dB; infinity for equal images, the worst value where one is not finite."""
    errors = ((reference.astype(np.float64) - other) ** 2).mean(axis=(1, 2, 3))
    if not np.isfinite(errors).all():
        return WORST_DB
    middle = float(np.median(errors))
    return math.inf if middle == 0 else 10 * math.log10(_PEAK**2 / middle)


def _reasons(facts: CompanionFacts, sqnr: float, floor: float, peaks: Peaks) -> list[str]:
    reasons = []
    beyond = peaks.first_beyond(LARGEST[facts.body])
    if beyond is not None:
        name, peak = beyond
        limit = LARGEST[facts.body]
        reasons.append(
            f"{facts.network}: the output of {name} reaches {peak:.3g}, above {limit:g}, the largest {facts.body} "
            "number; set companions.body to fp32"
        )
    if not sqnr >= floor - _FLOOR_MARGIN_DB:
        reasons.append(
            f"{facts.network}: {sqnr:.1f} dB to PyTorch in FP32, more than {_FLOOR_MARGIN_DB:g} dB below the noise "
            f"floor of {floor:.1f} dB"
        )
    return reasons
