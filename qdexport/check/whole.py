"""The whole network: its error end to end, and beside it the noise floor of the same denoiser calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qdexport.check.calls import check_calls
from qdexport.check.exact import exact_predictions
from qdexport.check.noise_floor import noise_floor
from qdexport.check.parity import end_to_end
from qdexport.core.io_spec import IoSpec
from qdexport.core.results import EndToEnd
from qdexport.quant.attach import QuantizedModel

__all__ = ["whole_network"]

OnProgress = Callable[[int, int], None]
_PHASES = 3
_MOST_DB = 999.0  # equal outputs have no finite distance


def whole_network(
    model: QuantizedModel, onnx_path: Path, io: IoSpec, on_progress: OnProgress | None = None
) -> EndToEnd:
    """Measures the ONNX file, and the randomly rounding fake-quant model, by the fake-quant model in FP32.

    Both numbers are of one call, that in which the file comes off best beside its floor, out of
    ``validation.floor_steps`` timesteps of ``validation.floor_seeds`` sampling runs, with one draw of the rounding
    each. Whether a code flips is chance, and costs one side of a pair tens of decibels; a file that is below the floor
    in every call is another matter.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file.
        io: its inputs and outputs.
        on_progress: called with the work done and its total.

    Raises:
        ParityError: the file cannot be run on the model's inputs.
    """
    validation = model.recipe.validation

    def phase(number: int) -> OnProgress:
        def report(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(number * total + done, _PHASES * total)

        return report

    calls = check_calls(
        model, io, validation.floor_steps, validation.seed, phase(0), batches=validation.floor_seeds
    )
    exact = exact_predictions(model.denoiser, [call.inputs for call in calls], phase(1))
    floor = noise_floor(model, io, calls, seeds=1, on_progress=phase(2), exact=exact)
    pairs = zip(end_to_end(model, onnx_path, io, calls, exact), floor, strict=True)
    sqnr, beside = max(pairs, key=lambda pair: min(pair[0], _MOST_DB) - min(pair[1], _MOST_DB))
    return EndToEnd(sqnr_db=sqnr, noise_floor_db=beside)
