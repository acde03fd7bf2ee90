"""Random denoisers and recipes through the whole compiler: what must hold for each draw."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from benchmarks.fuzz_draws import STEPS, Draw, draw, without_blocks
from benchmarks.synthetic import synthetic_plans, synthetic_ranges, usual_timesteps
from qdexport.build.engine import BuildOptions, build_engine
from qdexport.check.calls import check_calls
from qdexport.check.measure import sqnr_db
from qdexport.check.parity import layer_parity
from qdexport.check.verdict import layer_problems
from qdexport.core.formats import check_formats
from qdexport.core.recipe import Recipe
from qdexport.core.target import TARGETS, target_named
from qdexport.errors import GraphPassError, QdExportError, RecipeError
from qdexport.graph.evaluate import evaluate
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.passes import DEFAULT_ORDER, default_passes
from qdexport.passes.loading import with_passes
from qdexport.pipeline.lower import capture_network, lower_network, network_facts, stores_int4_weights
from qdexport.pipeline.validate import coverage_of
from qdexport.quant.attach import quantize_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx

    from qdexport.core.target import Target
    from qdexport.graph.runner import GraphPass, PassContext, PassReport
    from qdexport.pipeline.lower import Lowered
    from qdexport.quant.attach import QuantizedModel

__all__ = ["Checked", "Draw", "FuzzError", "check_draw", "draw", "quantized_draw", "refuses"]

# A wrong wire makes outputs independent: -3 dB. Between passes the graph has an FP32 body, where passes give the same
# numbers but for the order of sums (above 100 dB), and less only where that flips a code. Networks of a few bits come
# down to 10 dB by that, and below it what rounding alone does to the same graph is measured. Whether codes are equal is
# for the comparison of layers to say.
_LEAST_WHOLE_DB = 10.0
_ROUNDINGS = 6
_ROUNDING = 2.0**-18  # 32 units in the last place: sums of hundreds of terms in another order differ by as much
# their constants are steps and sizes
_EXACT = frozenset({"QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Resize"})


class FuzzError(Exception):
    """A draw broke a promise; the message says which."""


@dataclass(slots=True)
class Checked:
    """What was seen of one draw.

    Attributes:
        passes_db: SQNR of the network's output before and after each pass that changed something.
        layers: quantized layers and softmax quantizers that were compared.
        least_db: of their outputs.
        kernels: of the engine.
    """

    passes_db: dict[str, float] = field(default_factory=dict)
    layers: int = 0
    least_db: float = float("inf")
    kernels: int = 0


def check_draw(case: Draw, folder: Path, *, build: bool) -> Checked:
    """Compiles a draw for every target, executes the graph around each pass, and audits file and plan.

    Args:
        case: what to compile.
        folder: for graphs and engines.
        build: also build with TensorRT-RTX.

    Raises:
        FuzzError: a promise is broken: a type that was not planned, a code that differs, a pass that changes numbers,
            or a step that failed at all.
    """
    checked = Checked()
    try:
        exact = quantized_draw(replace(case, recipe={**case.recipe, "body": "fp32"}))
        captured = _captured(exact)
        _execute_passes(exact, captured, folder / "executed", checked)
        drawn = exact if case.recipe["body"] == "fp32" else quantized_draw(case)
        drawn_graph = captured if drawn is exact else _captured(drawn)
        for target in TARGETS.values():
            model, captured = drawn, drawn_graph
            if refuses(target, drawn):
                model = quantized_draw(replace(case, recipe=without_blocks(case.recipe)))
                captured = _captured(model)
            network = capture_network(model, target, captured=ir.from_proto(captured))
            lowered = lower_network(network, model, folder / target.name, default_passes())
            _check_file(model, lowered, target, checked)
            if build and target.name == "tensorrt-rtx":
                _check_engine(model, lowered, folder / "engine", checked)
    except QdExportError as error:
        raise FuzzError(f"{type(error).__name__}: {error}") from error
    return checked


def refuses(target: Target, model: QuantizedModel) -> bool:
    """Whether the table of formats has a layer of the draw that the target cannot take; the compiler must say so."""
    try:
        check_formats(model.plans, target)
    except RecipeError:
        with contextlib.suppress(RecipeError):
            capture_network(model, target)
            raise FuzzError(f"{target.name}: a format that the table refuses was compiled") from None
        return True
    return False


def quantized_draw(case: Draw) -> QuantizedModel:
    recipe = Recipe.model_validate(case.recipe)
    denoiser = random_unet(case.model, seed=case.seed, **case.changes)
    loaded = loaded_from_denoiser(denoiser, name=case.model)
    plans = synthetic_plans(loaded, recipe, case.seed)
    ranges = synthetic_ranges(loaded, plans, recipe, usual_timesteps(denoiser, STEPS), case.seed)
    return quantize_model(loaded, plans, recipe, ranges)


def _executed(behind: str, shared: _Shared) -> GraphPass:
    """A pass that changes nothing: it executes the graph in numpy and compares it with the execution before."""

    class Executed:
        """Runs directly behind the pass that is checked."""

        name: ClassVar[str] = f"executed-after-{behind}" if behind else "executed-first"
        exact: ClassVar[bool] = True
        runs_after: ClassVar[tuple[str, ...]] = (behind,) if behind else ()

        def apply(self, model: ir.Model, context: PassContext, report: PassReport) -> None:
            del context, report
            shared.execute(model, behind)

    return Executed()


@dataclass(slots=True)
class _Shared:
    """What executions hand on: the inputs, the last graph and its output, and SQNR by pass."""

    feeds: Mapping[str, np.ndarray]
    decibels: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    output: np.ndarray | None = None
    graph: onnx.ModelProto | None = None

    def execute(self, model: ir.Model, behind: str) -> None:
        """Executes a graph that differs from the last one, and compares the outputs."""
        proto = ir.to_proto(model)
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
        if digest == self.digest:
            return
        output = next(iter(evaluate(proto, self.feeds).values()))
        if self.output is not None and self.graph is not None:
            found = self.decibels[behind] = sqnr_db(self.output, output)
            if not (found >= _LEAST_WHOLE_DB or found >= self._rounding_db(self.graph, self.output)):
                raise GraphPassError(f"{behind} changes the network's output: SQNR {found:.1f} dB")
        self.digest, self.output, self.graph = digest, output, proto

    def _rounding_db(self, graph: onnx.ModelProto, output: np.ndarray) -> float:
        """The least SQNR of the output when every bias and factor of a graph is off by a rounding."""
        shaken = (_shaken(graph, seed) for seed in range(_ROUNDINGS))
        return min(sqnr_db(output, next(iter(evaluate(item, self.feeds).values()))) for item in shaken)


def _shaken(graph: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """A copy whose FP32 biases, factors and unquantized weights are off by up to one rounding."""
    copy: onnx.ModelProto = type(graph).FromString(graph.SerializeToString())
    source = np.random.default_rng(seed)
    fixed = {name for node in copy.graph.node if node.op_type in _EXACT for name in node.input}
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in fixed:
            array = numpy_helper.to_array(tensor)
            factors = 1 + source.uniform(-1, 1, array.shape) * _ROUNDING
            tensor.CopyFrom(numpy_helper.from_array((array * factors).astype(np.float32), tensor.name))
    return copy


def _captured(model: QuantizedModel) -> onnx.ModelProto:
    """What every target starts from; a capture takes longer than all else here."""
    return ir.to_proto(capture_network(model, target_named("onnxruntime")).model)


def _execute_passes(model: QuantizedModel, captured: onnx.ModelProto, folder: Path, checked: Checked) -> None:
    """Lowers for TensorRT-RTX with an execution behind every pass."""
    target = target_named("tensorrt-rtx")
    calls = check_calls(model, network_facts(model, target).io, 1, 0)
    shared = _Shared({name: tensor.numpy() for name, tensor in calls[0].inputs.items()}, checked.passes_db)
    # the last one stands in front of the check of all types: nothing may come behind that
    names = ["", *(item.name for item in DEFAULT_ORDER[:-1])]
    network = capture_network(model, target, captured=ir.from_proto(captured))
    lower_network(network, model, folder, with_passes(default_passes(), [_executed(name, shared) for name in names]))


def _check_file(model: QuantizedModel, lowered: Lowered, target: Target, checked: Checked) -> None:
    """Types as planned, and every layer of the file against PyTorch on equal inputs."""
    problems = coverage_of(model, lowered.file.path, None, int4=stores_int4_weights(model, target)).mismatches
    calls = check_calls(model, lowered.facts.io, 3, 0)
    layers = layer_parity(model, lowered.file.path, lowered.facts.io, calls)
    problems += layer_problems(layers, model.body)
    if problems:
        raise FuzzError(f"{target.name}: {'; '.join(problems)}")
    checked.layers = len(layers)
    checked.least_db = min(checked.least_db, *(item.sqnr_db for item in layers))


def _check_engine(model: QuantizedModel, lowered: Lowered, folder: Path, checked: Checked) -> None:
    """The kernel plan against the plan."""
    target = target_named("tensorrt-rtx")
    options = BuildOptions(target=target, io=lowered.facts.io, compute_capabilities=("8.9",))
    facts, plan = build_engine(lowered.file.path, folder, options)
    coverage = coverage_of(model, lowered.file.path, plan, int4=stores_int4_weights(model, target))
    problems = coverage.mismatches
    if problems:
        raise FuzzError(f"engine: {'; '.join(problems)}")
    checked.kernels = facts.kernels
