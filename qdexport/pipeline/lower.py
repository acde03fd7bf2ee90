"""From a fake-quant model to an ONNX file: capture, passes, emission."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdexport.capture.export import capture
from qdexport.core.formats import check_formats
from qdexport.core.network_facts import NetworkFacts
from qdexport.core.pass_log import PASS_LOG_FILE, PassFacts, PassLog
from qdexport.core.target import INT4_OPSET
from qdexport.emit.onnx_file import OnnxFile, emit
from qdexport.errors import RecipeError
from qdexport.graph.runner import PassContext, PassReport, run_passes
from qdexport.models.denoiser_io import io_spec, label_count
from qdexport.models.schedules import timestep_rounding
from qdexport.passes import default_passes
from qdexport.passes.fold_time_embedding import time_columns
from qdexport.passes.loading import with_passes
from qdexport.pipeline.time_rows import has_fractional_steps, time_rows, timestep_bounds
from qdexport.quant.attach import training_steps_of
from qdexport.quant.softmax import SoftmaxQuantizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx_ir as ir

    from qdexport.core.files import Owner
    from qdexport.core.forms import FormTable
    from qdexport.core.io_spec import IoSpec
    from qdexport.core.target import Target
    from qdexport.graph.runner import GraphPass
    from qdexport.quant.attach import QuantizedModel

__all__ = [
    "Lowered",
    "Network",
    "capture_network",
    "check_target",
    "lower_network",
    "lower_to_onnx",
    "model_io",
    "network_facts",
    "stores_int4_weight_only",
    "stores_int4_weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """An emitted network."""

    file: OnnxFile
    facts: NetworkFacts
    passes: tuple[PassReport, ...]


def check_target(model: QuantizedModel, target: Target) -> None:
    """Refuses what the target cannot do, before anything is made.

    Raises:
        RecipeError: the body's type, or the format of a layer, is not one of the target's.
    """
    if model.body not in target.bodies:
        raise RecipeError(
            f"target {target.name} cannot run a {model.body} body; set `body` to one of {', '.join(target.bodies)}"
        )
    check_formats(model.plans, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A captured network, and what its passes will read.

    Attributes:
        model: of the quantized dialect.
        facts: what it will say about itself.
        context: for the passes; its forms are those that were asked for.
    """

    model: ir.Model
    facts: NetworkFacts
    context: PassContext


def capture_network(
    model: QuantizedModel, target: Target, forms: FormTable | None = None, captured: ir.Model | None = None
) -> Network:
    """Captures a fake-quant model.

    Args:
        model: of any recipe.
        target: decides what passes will do.
        forms: which form operators are written in; None: the table that comes with qdexport.
        captured: the capture, if it was made already: it depends on the model alone, not on the target.

    Raises:
        RecipeError: the target cannot do what the recipe asks, or there is no schedule for the time table.
        CaptureError: PyTorch cannot export the model.
    """
    check_target(model, target)
    io = model_io(model)
    graph = capture(model.denoiser, io).model if captured is None else captured
    # the time layers that `keep` leaves in may be quantized by step, which is no table
    columns = time_columns(graph, io) if model.recipe.time_embedding == "auto" else None
    facts = network_facts(model, target, columns)
    context = PassContext(
        target=target,
        body=model.body,
        io=facts.io,
        layers=model.plans,
        timesteps=facts.time_table,
        training_steps=facts.training_steps,
        timestep_rounding=facts.timestep_rounding,
        bos=None if model.bos is None else model.bos.embedding.numpy(),
        int4=stores_int4_weights(model, target),
        int4_weight_only=stores_int4_weight_only(model, target),
        forms=forms,
    )
    return Network(model=graph, facts=facts, context=context)


def lower_to_onnx(  # noqa: PLR0913  what is lowered, where to, and what may differ from the usual
    model: QuantizedModel,
    folder: Path,
    target: Target,
    dump_dir: Path | None = None,
    extra_passes: Sequence[GraphPass] = (),
    forms: FormTable | None = None,
    passes: Sequence[GraphPass] | None = None,
    owner: Owner | None = None,
) -> Lowered:
    """Captures a fake-quant model, runs every pass, and writes ``folder/model.onnx`` and what every pass did.

    Args:
        model: of any recipe.
        folder: is replaced.
        target: decides what passes do.
        dump_dir: for the graph after every pass.
        extra_passes: a user's own.
        forms: which form operators are written in; None: the table that comes with qdexport.
        passes: instead of all of them (to measure what some of them bring).
        owner: knows which files of the folder are ours; None: all.

    Raises:
        RecipeError: the target cannot do what the recipe asks, or there is no schedule for the time table.
        CaptureError: PyTorch cannot export the model.
        GraphPassError: a pass refuses the graph.
        EmitError: the result is not legal ONNX.
        OutputError: the folder cannot be written.
    """
    network = capture_network(model, target, forms)
    chosen = with_passes(list(default_passes() if passes is None else passes), extra_passes)
    return lower_network(network, model, folder, chosen, dump_dir, owner)


def lower_network(
    network: Network,
    model: QuantizedModel,
    folder: Path,
    passes: Sequence[GraphPass],
    dump_dir: Path | None = None,
    owner: Owner | None = None,
) -> Lowered:
    """The same for a network that was captured already, with exactly these passes; the network's graph is used up."""
    target = network.context.target
    reports = run_passes(network.model, passes, network.context, dump_dir)
    facts = network.facts.model_copy(update={"notes": {**_notes(model), **_pass_notes(reports)}})
    file = emit(network.model, folder, target, facts.to_metadata(), owner)
    if owner is not None:
        owner.claim([folder / PASS_LOG_FILE])
    _log(reports).save(folder / PASS_LOG_FILE)
    return Lowered(file=file, facts=facts, passes=tuple(reports))


def _notes(model: QuantizedModel) -> dict[str, str]:
    """What layers and attention blocks have beside their widths."""
    notes = {plan.name: "first token of the text: constant" for plan in model.plans if plan.bos and plan.quantized}
    for name, module in model.denoiser.named_modules():
        if isinstance(module, SoftmaxQuantizer):
            rows, logarithmic = len(module.mode), int(module.mode.sum())
            kinds = (
                f"log2 in {logarithmic} of {rows} rows, else uniform"
                if 0 < logarithmic < rows
                else ("log2" if logarithmic else "uniform")
            )
            notes[name] = f"behind softmax: {module.spec.bits} bits, {kinds}"
    return notes


def _log(reports: Sequence[PassReport]) -> PassLog:
    """Without seconds, so that equal graphs have equal logs."""
    return PassLog(
        passes=[
            PassFacts(
                name=report.name,
                exact=report.exact,
                nodes_before=report.nodes_before,
                nodes_after=report.nodes_after,
                touched=list(dict.fromkeys(report.touched)),
                notes=report.notes,
                skipped=[(item.node, item.reason) for item in report.skipped],
                chosen=report.chosen,
            )
            for report in reports
        ]
    )


def _pass_notes(reports: Sequence[PassReport]) -> dict[str, str]:
    return {name: note for report in reports for name, note in report.notes.items()}


def stores_int4_weights(model: QuantizedModel, target: Target) -> bool:
    """Whether narrow weights of linear layers are stored as INT4: the target can, and the recipe allows it."""
    return target.int4_linear and model.recipe.int4_storage == "auto"


def stores_int4_weight_only(model: QuantizedModel, target: Target) -> bool:
    """Whether narrow weights of layers whose input is not quantized are stored as INT4: opset and recipe allow it."""
    return target.opset >= INT4_OPSET and model.recipe.int4_storage == "auto"


def model_io(model: QuantizedModel) -> IoSpec:
    """The exported network's inputs and output. Raises as :func:`io_spec`."""
    fractions = model.recipe.time_embedding == "keep" or has_fractional_steps(model)
    return io_spec(model.loaded, model.recipe.shapes, model.body, fractions=fractions)


def network_facts(model: QuantizedModel, target: Target, columns: int | None = None) -> NetworkFacts:
    """What the network will say about itself.

    Args:
        model: of any recipe.
        target: that it is lowered for.
        columns: numbers in one row of the time table, where the graph is known; ``auto`` decides by them.

    Raises:
        RecipeError: the time table needs a schedule and the model has none.
    """
    recipe = model.recipe
    training_steps = training_steps_of(model.loaded)
    io = model_io(model)
    fractions = any(spec.role == "timestep" and spec.dtype == "float32" for spec in io.inputs)
    scheduler = model.loaded.scheduler
    return NetworkFacts(
        model=model.loaded.name,
        recipe=recipe.name,
        recipe_digest=recipe.digest(),
        target=target.name,
        body=model.body,
        scheduler="" if scheduler is None else type(scheduler).__name__,
        training_steps=training_steps,
        timestep_bounds=timestep_bounds(model, fractions=fractions),
        timestep_rounding=timestep_rounding(model.loaded.denoiser),
        time_table=time_rows(model, columns, fractions=fractions),
        scale_rows=model.timesteps if model.rows > 1 else (),
        labels=label_count(model.loaded.denoiser),
        io=io,
    )
