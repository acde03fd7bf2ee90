"""Runs passes in order: each is named, timed, checked, and may be dumped; each says what it could not do and why."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import onnx_ir as ir

from qdexport.core.forms import Choice, FormTable, Signature, shipped_forms
from qdexport.core.precision import Body
from qdexport.core.replace import NEW
from qdexport.core.writing import output_errors
from qdexport.errors import GraphPassError, QdExportError
from qdexport.graph.edit import name_everything

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from qdexport.core.io_spec import IoSpec
    from qdexport.core.spec import LayerPlan
    from qdexport.core.target import Target

__all__ = ["FormPass", "GraphPass", "PassContext", "PassReport", "WhyNot", "dump_names", "run_passes"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What passes may read.

    Attributes:
        target: where the graph will run.
        body: type of everything that is not quantized, ``fp32`` or ``fp16``.
        io: inputs and outputs.
        layers: the recipe's decision for every Conv2d and Linear.
        timesteps: rows of the time table, exact scheduler timesteps; None keeps the time layers in the graph.
        training_steps: number of training timesteps; valid timesteps are below it.
        timestep_rounding: by what share of itself a pipeline rounds a fractional timestep before it calls the network.
        bos: the text encoder's embedding of the first token, FP32 ``[D]``; None when no layer is BOS-aware.
        int4: whether weights of linear layers may be stored as INT4 (the target can, and the recipe allows it).
        int4_weight_only: likewise, of layers whose weight alone is quantized.
        forms: which form operators are written in; None: the table that comes with qdexport.
    """

    target: Target
    body: Body
    io: IoSpec
    layers: tuple[LayerPlan, ...]
    timesteps: tuple[float, ...] | None
    training_steps: int
    timestep_rounding: float = 0.0
    bos: np.ndarray | None = None
    int4: bool = False
    int4_weight_only: bool = False
    forms: FormTable | None = None

    def form_of(self, operator: str, signature: Signature, default: str) -> Choice:
        """The form that an operator is written in, and why; ``default`` where nothing was measured."""
        table = shipped_forms(self.target.name) if self.forms is None else self.forms
        return table.choose(operator, signature, default)

    def plan_of(self, name: str) -> LayerPlan | None:
        """The decision for a layer."""
        return next((plan for plan in self.layers if plan.name == name), None)


@dataclass(frozen=True, slots=True)
class WhyNot:
    """A place where a pass did not apply."""

    node: str
    reason: str


@dataclass(slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        touched: torch modules whose nodes it changed.
        notes: what became of a torch module, where a pass has more than one way.
        skipped: places where it did not apply.
        chosen: the form that an operator of a torch module got, where there are several, and why.
    """

    name: str
    exact: bool = True
    changed: bool = False
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    touched: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: list[WhyNot] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)


class GraphPass(Protocol):
    """The contract of a pass: a class with a kebab-case name, what it must follow, and whether numbers stay equal.

    ``exact`` says that no number changes but for roundings of floating-point sums. A pass that changes those says so in
    ``up_to``, for instance "the order of sums"; without it, every number stays bit for bit.

    ``apply`` edits the model in place, appends to ``report.touched`` and ``report.skipped``, and raises
    ``GraphPassError`` (naming the torch module) for what it must refuse. A second run changes nothing.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    runs_after: ClassVar[tuple[str, ...]]

    def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None: ...


class FormPass(GraphPass, Protocol):
    """A pass that writes an operator in one of several forms, which ``PassContext.form_of`` chooses.

    Attributes:
        operator: kind of operator.
        forms: names of the forms; the first is that of the export, which the pass leaves alone.
        default: the form where nothing was measured.
    """

    operator: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    default: ClassVar[str]


def run_passes(
    model: ir.Model, passes: Sequence[GraphPass], context: PassContext, dump_dir: Path | None = None
) -> list[PassReport]:
    """Runs the passes in the given order.

    Args:
        model: edited in place.
        passes: each may run only after those in its ``runs_after`` that are in the list at all.
        context: read-only facts.
        dump_dir: writes the graph after each pass as ``NN-name.onnx`` (weights apart) when given.

    Returns:
        One report per pass.

    Raises:
        GraphPassError: the order is wrong, or a pass refuses the graph; the message names pass and place.
    """
    _check_order(passes)
    reports = []
    for index, graph_pass in enumerate(passes, 1):
        report = PassReport(graph_pass.name, exact=graph_pass.exact, nodes_before=len(model.graph))
        started = time.perf_counter()
        try:
            graph_pass.apply(model, context, report)
            name_everything(model)
        except QdExportError as error:
            raise GraphPassError(f"pass {index} {graph_pass.name!r}: {error}") from error
        except (Exception, SystemExit) as error:  # a pass can be a user's own
            failure = GraphPassError(f"pass {index} {graph_pass.name!r} failed with {type(error).__name__}: {error}")
            failure.keep_traceback = True
            raise failure from error
        report.seconds = time.perf_counter() - started
        report.nodes_after = len(model.graph)
        report.changed = bool(report.touched)
        logger.info(
            "pass %d %s: %d -> %d nodes, %d modules touched, %.2f s",
            index,
            report.name,
            report.nodes_before,
            report.nodes_after,
            len(report.touched),
            report.seconds,
        )
        if dump_dir is not None:
            _dump(model, dump_dir, *_dump_names(index, report.name))
        reports.append(report)
    return reports


def dump_names(passes: Sequence[GraphPass]) -> list[str]:
    """The files that :func:`run_passes` writes into ``dump_dir``."""
    return [name for index, graph_pass in enumerate(passes, 1) for name in _dump_names(index, graph_pass.name)]


def _dump_names(index: int, name: str) -> tuple[str, str]:
    return f"{index:02d}-{name}.onnx", f"{index:02d}-{name}.data"


def _dump(model: ir.Model, folder: Path, graph: str, weights: str) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=NEW, dir=folder, ignore_cleanup_errors=True) as name:
            partial = Path(name)
            ir.save(model, partial / graph, external_data=weights)
            for file in (weights, graph):
                if (partial / file).exists():
                    (partial / file).replace(folder / file)


def _check_order(passes: Sequence[GraphPass]) -> None:
    names = [graph_pass.name for graph_pass in passes]
    for index, graph_pass in enumerate(passes):
        late = [name for name in graph_pass.runs_after if name in names[index + 1 :]]
        if late:
            raise GraphPassError(f"pass {graph_pass.name!r} must run after {', '.join(late)}")
