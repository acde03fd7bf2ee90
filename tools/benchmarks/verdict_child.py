"""Both verdicts of one recipe over some seeds of validation: ``python -m benchmarks.verdict_child SPEC.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.children import answer
from benchmarks.quality_child import FileProgress
from qdexport.check import quality as quality_module
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.check.outcome import verdict_of
from qdexport.core.digests import digest_of
from qdexport.core.files import atomic_path, write_json
from qdexport.core.recipe import Recipe
from qdexport.core.results import Report
from qdexport.core.target import target_named
from qdexport.errors import INTERRUPTED_EXIT_CODE, QdExportError
from qdexport.models.denoiser_io import io_spec
from qdexport.models.sampling import SampleRequest, sample
from qdexport.pipeline.compilation import Compilation, CompileOptions, new_manifest, new_report
from qdexport.pipeline.validate import validate
from qdexport.pipeline.workspace import Workspace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qdexport.models.loaded import LoadedModel
    from qdexport.quant.attach import QuantizedModel

__all__ = ["KeptPictures", "main"]


class KeptPictures:
    """Stands in for :func:`qdexport.models.sampling.sample`, and makes no picture twice.

    All recipes of one model share the pictures of the floating-point model; a verdict that is thought over again shares
    all of them.

    Args:
        folder: of all recipes of a model.
        recipe: whose quantized pictures these are.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder = folder
        self._recipe = digest_of(recipe.model_dump(mode="json", exclude={"validation", "name", "description"}))

    def __call__(
        self, loaded: LoadedModel, request: SampleRequest, *, denoiser: Any = None, **watchers: Any
    ) -> NDArray[np.float32]:
        """The pictures of a request; what watches the calls sees none where they are found again."""
        whose = "onnx" if isinstance(denoiser, OnnxDenoiser) else "quantized"
        key = digest_of(asdict(request), "fp" if denoiser is None else [whose, self._recipe])
        path = self._folder / f"{key[:20]}.npz"
        if not path.is_file():
            made = sample(loaded, request, denoiser=denoiser, **watchers)
            with atomic_path(path) as partial, partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, images=made)
        with path.open("rb") as found, np.load(found, allow_pickle=False) as arrays:
            images: NDArray[np.float32] = arrays["images"]
        return images


def main(spec_path: str) -> None:
    """Quantizes once, and validates with every seed; what was found for a seed is a file of its own.

    The specification holds ``model``, ``recipe`` (as JSON), ``seeds`` (pairs of a seed and the file of its result),
    ``compiled`` (whether the network is lowered and compared, too), ``target``, ``build`` (whether an engine is built),
    ``threads``, ``folder`` (of this recipe), ``pictures`` (of the model), ``sheet`` and ``progress`` (files).
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(int(spec["threads"]))
    recipe, progress = Recipe.model_validate(spec["recipe"]), FileProgress(Path(spec["progress"]))
    options = CompileOptions(
        model=spec["model"], recipe=recipe, target=target_named(spec["target"]), copy_weights=False
    )
    kept = KeptPictures(Path(spec["pictures"]), recipe)
    with (
        Workspace.open(Path(spec["folder"]), new_manifest(options), new_report(options)) as workspace,
        mock.patch.object(quality_module, "sample", kept),
    ):
        run = Compilation(options, workspace, progress)
        run.quantize()
        if spec["compiled"]:
            run.export()
            if spec["build"]:
                run.build()
        for number, (seed, path) in enumerate(spec["seeds"]):
            progress.tell(doing=f"seed {seed}", images=float(number))
            validation = recipe.validation.model_copy(update={"seed": seed})
            if spec["compiled"]:  # the other runs judge pictures, and this verdict does not look at any
                alone = validation.pictures.model_copy(update={"extend": 1})
                validation = validation.model_copy(update={"images": 2, "pictures": alone})
            model = replace(run.model, recipe=run.model.recipe.model_copy(update={"validation": validation}))
            if spec["compiled"]:
                validate(model, workspace, progress)
                report = workspace.report
            else:
                report = _pictures_alone(model, workspace.report, Path(spec["sheet"]))
            write_json(Path(path), _result(seed, report))
    answer(spec, {})


def _pictures_alone(model: QuantizedModel, header: Report, sheet: Path) -> Report:
    io = io_spec(model.loaded, model.recipe.shapes, model.body)
    report = header.model_copy(update={"parity": None, "coverage": None})
    report.quality, images = quality_module.compare_quality(model, None, io)
    if not sheet.is_file():
        with atomic_path(sheet) as partial, partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **{name: batch[:8] for name, batch in images.items()})
    return report


def _result(seed: int, report: Report) -> dict[str, Any]:
    verdict, quality, parity = verdict_of(report), report.quality, report.parity
    result: dict[str, Any] = {"seed": seed, **verdict.model_dump(mode="json")}
    if quality is not None:
        scores = quality.quantized
        result |= {
            "images": quality.images,
            "mse": scores.mse,
            "share": None if scores.share is None else scores.share.model_dump(),
            "texture": None if scores.texture is None else scores.texture.model_dump(),
            "contrast": None if scores.contrast is None else scores.contrast.model_dump(),
            "fall": None if scores.alignment_fall is None else scores.alignment_fall.model_dump(),
        }
    if parity is not None:
        result["parity"] = {
            "flips": max((item.code_flip_rate for item in parity.layers), default=0.0),
            "layer_db": min((item.sqnr_db for item in parity.layers), default=None),
            "whole_db": parity.end_to_end.sqnr_db,
            "floor_db": parity.end_to_end.noise_floor_db,
        }
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except QdExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
