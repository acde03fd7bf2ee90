"""The validate stage: plan audit, compiler parity, noise floor, image quality, golden inputs and outputs."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from qdexport.build.audit import audit
from qdexport.build.plan import engine_coverage
from qdexport.build.storage import engine_weight_types, storage_mismatches
from qdexport.build.sums import half_precision_sums
from qdexport.check.calls import check_calls
from qdexport.check.costs import cost_of
from qdexport.check.engine_parity import write_golden
from qdexport.check.file_pictures import picture_problems
from qdexport.check.float64.parity import float64_parity
from qdexport.check.layer_errors import layer_errors
from qdexport.check.parity import layer_parity
from qdexport.check.quality import compare_quality
from qdexport.check.session import REFERENCE
from qdexport.check.shapes import calls_at_shapes, shape_parity
from qdexport.check.verdict import judge
from qdexport.check.whole import whole_network
from qdexport.core.files import atomic_dir
from qdexport.core.precision import BYTES
from qdexport.core.results import Coverage, Plan, ScaleRow, WeightStorage
from qdexport.core.spec import Granularity, layer_precision, weight_storage
from qdexport.core.target import target_named
from qdexport.core.timesteps import stretches
from qdexport.emit.coverage import onnx_coverage, onnx_weight_types
from qdexport.emit.facts import read_network_facts
from qdexport.models.sampling import prompts_for
from qdexport.pipeline.lower import stores_int4_weight_only, stores_int4_weights
from qdexport.pipeline.sampling import save_images
from qdexport.pipeline.workspace import Made
from qdexport.quant.attach import training_steps_of
from qdexport.quant.plan import average_weight_bits, macs_share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qdexport.core.io_spec import IoSpec
    from qdexport.core.progress import ProgressSink
    from qdexport.pipeline.workspace import Workspace
    from qdexport.quant.attach import QuantizedModel

__all__ = ["validate"]



def validate(
    model: QuantizedModel, workspace: Workspace, progress: ProgressSink, *, quick: bool = False
) -> list[Made]:
    """Fills the report's coverage, parity, layer errors, cost and quality, and writes images and golden files.

    ``quick`` is noted beside the results: the model's recipe asked for less than the user's.

    Raises:
        ParityError: a layer cannot be compared at all. (A layer that differs is a verdict, not an error.)
        ModelError: the sampler's steps are not those of the network's tables.
    """
    onnx_path = workspace.path("onnx")
    facts = read_network_facts(onnx_path)
    plan = workspace.manifest.artifact("plan")
    report, validation = workspace.report, model.recipe.validation
    report.body = model.body
    int4 = stores_int4_weights(model, target_named(facts.target).with_opset(model.recipe.opset))
    kernels = Plan.load(workspace.path("plan")) if plan else None
    report.coverage = coverage_of(model, onnx_path, kernels, int4=int4)
    report.coverage.notes = facts.notes
    report.cost = cost_of(model, report.coverage, kernels, report.engine.compute_capabilities if report.engine else ())

    calls = check_calls(model, facts.io, validation.parity_steps, validation.seed)
    with _counted(progress, "parity, layer by layer") as advance:
        layers = layer_parity(model, onnx_path, facts.io, calls, advance)
    with _counted(progress, "tables and tensors in float64") as advance:
        float64 = float64_parity(model, onnx_path, facts, calls, calls_at_shapes(facts.io, calls), advance)
    with _counted(progress, "whole network and noise floor") as advance:
        whole = whole_network(model, onnx_path, facts.io, advance)
    with _counted(progress, "parity at every shape") as advance:
        shapes, at_shapes = shape_parity(model, onnx_path, facts.io, calls, advance)
    with _counted(progress, "error of every layer") as advance:
        report.layer_errors = layer_errors(model, calls, validation.seed, advance)
    golden = workspace.root / "golden"
    write_golden(golden, onnx_path, facts.io, [*calls[: validation.golden], *at_shapes], workspace, facts)
    made = [Made("golden", golden)]
    images, pictures = _images(model, onnx_path, facts.io, workspace, progress)
    report.parity = judge(layers, whole, model.body, REFERENCE, shapes, float64, pictures)
    report.parity.quick = quick
    return [*made, Made("images", images)] if images else made


def coverage_of(model: QuantizedModel, onnx_path: Path, plan: Plan | None, *, int4: bool) -> Coverage:
    """Planned, emitted and compiled type of every layer, and what does not agree.

    ``int4`` says whether narrow weights of linear layers are stored as INT4.
    """
    planned = {
        part: layer_precision(layer, model.body, int4_linear=int4) for layer in model.plans for part in layer.parts
    }
    emitted = onnx_coverage(onnx_path, model.plans)
    compiled = None
    if plan is not None:
        compiled = engine_coverage(plan, list(planned))
        for part, precision in planned.items():
            if precision == "folded" and compiled[part] == "missing":
                compiled[part] = "folded"
    storage = _storage_of(model, onnx_path, plan)
    sums = [] if plan is None else half_precision_sums(plan, _scaled_per_channel(model))
    return Coverage(
        planned=planned,
        onnx=emitted,
        engine=compiled or {},
        storage=storage,
        bits={
            part: [layer.weight.bits, int(8 * BYTES[model.body]) if layer.activation is None else layer.activation.bits]
            for layer in model.plans
            for part in layer.parts
            if layer.weight is not None
        },
        why={part: layer.why for layer in model.plans for part in layer.parts},
        scale_rows=_scale_rows(model),
        macs_planned_share=macs_share(model.plans),
        average_weight_bits=average_weight_bits(model.denoiser, model.plans),
        mismatches=[*audit(planned, emitted, compiled), *storage_mismatches(storage), *sums],
    )


def _scale_rows(model: QuantizedModel) -> list[ScaleRow]:
    if model.rows == 1:
        return []
    read = stretches(model.timesteps, training_steps_of(model.loaded))
    return [
        ScaleRow(timestep=step, first=first, last=last)
        for step, (first, last) in zip(model.timesteps, read, strict=True)
    ]


def _scaled_per_channel(model: QuantizedModel) -> frozenset[str]:
    """Layers, and parts of them, that multiply codes and have a scale per output channel."""
    return frozenset(
        part
        for layer in model.plans
        if layer.quantized and layer.weight is not None and layer.weight.granularity is Granularity.PER_CHANNEL
        for part in layer.parts
    )


def _storage_of(model: QuantizedModel, onnx_path: Path, plan: Plan | None) -> dict[str, WeightStorage]:
    """How the weights of weight-only layers are stored."""
    layers = [layer for layer in model.plans if layer.weight_only]
    if not layers:
        return {}
    target = target_named(read_network_facts(onnx_path).target).with_opset(model.recipe.opset)
    narrow = stores_int4_weight_only(model, target)
    emitted = onnx_weight_types(onnx_path, [layer.name for layer in layers])
    sizes = {layer.name: model.denoiser.get_parameter(f"{layer.name}.weight").numel() for layer in layers}
    compiled = {} if plan is None else engine_weight_types(plan, sizes)
    return {
        layer.name: WeightStorage(
            planned=weight_storage(layer, int4_linear=False, int4_weight_only=narrow),
            onnx=emitted[layer.name],
            engine=compiled.get(layer.name),
        )
        for layer in layers
    }


def _images(
    model: QuantizedModel, onnx_path: Path, io: IoSpec, workspace: Workspace, progress: ProgressSink
) -> tuple[Path | None, list[str]]:
    """Writes pictures; returns their folder, and what is wrong with those of the file."""
    validation = model.recipe.validation
    quality, images = compare_quality(model, onnx_path, io, partial(_counted, progress))
    workspace.report.quality = quality
    if quality is None:
        _note(workspace, "No images: the model came without a pipeline that samples it.")
        return None, []
    if model.loaded.evaluator is not None and quality.fp.alignment is None:
        size = " x ".join(map(str, images["fp"].shape[-2:]))
        _note(workspace, f"The evaluator of {model.loaded.name} reads no images of {size}: they have no alignment.")
    folder = workspace.root / "images"
    with atomic_dir(folder, workspace) as fresh:
        save_images(fresh, images, prompts_for(model.loaded, validation.images, validation.seed))
    return folder, picture_problems(images)


def _note(workspace: Workspace, text: str) -> None:
    if text not in workspace.report.notes:
        workspace.report.notes.append(text)


@contextlib.contextmanager
def _counted(progress: ProgressSink, description: str) -> Iterator[Callable[[int, int], None]]:
    """Turns ``(done, total)`` callbacks into a bar in percent."""
    shown = 0
    with progress.track(100, description) as advance:

        def show(done: int, total: int) -> None:
            nonlocal shown
            share = done * 100 // max(total, 1)
            advance(share - shown)
            shown = share

        yield show
