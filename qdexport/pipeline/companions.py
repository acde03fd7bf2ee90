"""The networks beside the denoiser: export, build and check, each a stage that is found again by its digests.

``OUT/<network>/`` is laid out as ``OUT/`` itself: ``onnx/``, ``engine/``, ``golden/``.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdexport.build.audit import floating_mismatches
from qdexport.build.engine import BuildOptions, build_engine, checked_capabilities, engine_files
from qdexport.build.plan import engine_coverage
from qdexport.capture.export import capture_network
from qdexport.check.calls import sample_size
from qdexport.check.companions import OnnxCompanion, companion_parity, try_pipeline
from qdexport.check.engine_parity import write_golden
from qdexport.check.half_range import why_not_half
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.core.companion_facts import COMPANION_NAMES, CompanionFacts
from qdexport.core.digests import digest_of, tree_sha256
from qdexport.core.precision import ONNX
from qdexport.core.results import CompanionResult, Plan
from qdexport.emit.facts import read_companion_facts, read_network_facts
from qdexport.emit.inspect import onnx_facts
from qdexport.emit.onnx_file import MODEL_FILE, emit
from qdexport.errors import ModelError, QdExportError
from qdexport.graph.runner import PassContext, run_passes
from qdexport.models.companions import (
    ASKED,
    NETWORK,
    Companion,
    companion_facts,
    companion_of,
    example_companion_inputs,
    find_companions,
    load_companion,
)
from qdexport.models.sampling import DenoiserCall, SampleRequest, prompts_for
from qdexport.passes import floating_point_passes
from qdexport.pipeline.workspace import Made

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qdexport.core.companion_facts import CompanionName
    from qdexport.core.files import Owner
    from qdexport.core.io_spec import IoSpec
    from qdexport.core.progress import ProgressSink
    from qdexport.core.results import ArtifactKind
    from qdexport.core.target import Target
    from qdexport.emit.onnx_file import OnnxFile
    from qdexport.pipeline.workspace import Workspace
    from qdexport.quant.attach import QuantizedModel

__all__ = ["CompanionStages", "audited_layers", "lower_companion"]

logger = logging.getLogger(__name__)

_IMAGES = 4
_PRECISIONS = {onnx: name for name, onnx in ONNX.items()}


def lower_companion(
    companion: Companion, folder: Path, target: Target, owner: Owner | None = None
) -> OnnxFile:
    """Captures a network, runs the passes for floating-point networks, and writes ``folder/model.onnx``.

    Raises:
        CaptureError: PyTorch cannot export it.
        GraphPassError: a pass refuses the graph, which has two floating-point types in one place, for instance.
        EmitError: the result is not legal ONNX.
        OutputError: the folder cannot be written.
    """
    facts = companion.facts
    captured = capture_network(companion.module, NETWORK, facts.io, example_companion_inputs(companion, seed=0))
    context = PassContext(
        target=target, body=facts.body, io=facts.io, layers=(), timesteps=None, training_steps=0
    )
    run_passes(captured.model, floating_point_passes(), context)
    return emit(captured.model, folder, target, facts.to_metadata(), owner)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompanionStages:
    """Runs the stages of all networks beside the denoiser over one output folder.

    Attributes:
        workspace: an open output folder that holds the denoiser's ONNX file.
        model: gives the fake-quant model, of this run or of the checkpoint.
        target: where they will run.
        force: stages to do again although nothing changed.
        progress: where progress is shown.
    """

    workspace: Workspace
    model: Callable[[], QuantizedModel]
    target: Target
    force: frozenset[str]
    progress: ProgressSink

    def names(self) -> tuple[CompanionName, ...]:
        """Which networks the recipe asks for and the model has; notes say which are left out."""
        model = self.model()
        found = find_companions(model.loaded, model.recipe.companions)
        for note in found.notes:
            self.workspace.note("export", note)
        return found.names

    def export(self) -> None:
        """Writes ``OUT/<network>/onnx/`` for each network, and removes those that are no longer asked for."""
        names = self.names()
        self._forget(names)
        denoiser = read_network_facts(self.workspace.path("onnx")).io
        for facts in [self._facts(name, denoiser) for name in names]:  # all of them before anything is made
            self._export(facts)

    def _facts(self, name: CompanionName, denoiser: IoSpec) -> CompanionFacts:
        """What a network computes in: FP16, unless its numbers do not fit.

        Raises:
            ModelError: the recipe insists on FP16.
        """
        model = self.model()
        asked, shapes = model.recipe.companions.body, model.recipe.shapes
        facts, single = (
            companion_facts(model.loaded, name, denoiser, body, self.target.name, shapes) for body in (asked, "fp32")
        )
        if facts.body == "fp32":
            return facts
        reason = self._measured(facts)
        if reason is None:
            with self.progress.stage(f"measure {name}"):
                network = companion_of(getattr(model.loaded.pipeline, facts.component), single)
                # what leaves FP16 inside of T5 computes in FP32 by rule
                reason = why_not_half(network, weights_alone=bool(facts.wide_modules))
        if not reason:
            return facts
        if asked == "fp16":
            raise ModelError(f"the {name} cannot compute in FP16: {reason}; set companions.body to fp32 or auto")
        self.workspace.note("export", f"The {name} computes in FP32: {reason}.")
        return single.model_copy(update={"why_body": reason})

    def _measured(self, facts: CompanionFacts) -> str | None:
        """Why an earlier run put the same network into FP32, empty if it did not; None if there was none."""
        stage = f"export:{facts.network}"
        made = next((item for item in self.workspace.manifest.artifacts if item.stage == stage), None)
        known = self._results().get(facts.network)
        if made is None or known is None:
            return None
        source, _ = self._source(facts)
        if made.inputs.get("weights") != tree_sha256(source / facts.component):
            return None
        if known.body == "fp16":
            return ""
        return None if known.why_body == ASKED else known.why_body

    def build(self) -> None:
        """Writes ``OUT/<network>/engine/`` for each network."""
        for name in self._exported():
            self._build(name)

    def validate(self) -> None:
        """Compares each network and the whole pipeline with PyTorch; writes ``OUT/<network>/golden/``."""
        names = self._exported()
        if not names:
            return
        inputs = {"validation": digest_of(self.model().recipe.validation.model_dump())}
        with self.progress.stage("validate companions"):
            self.workspace.run_stage(
                "validate:companions", inputs, lambda: self._check(names), force="validate" in self.force
            )

    def _exported(self) -> tuple[CompanionName, ...]:
        return tuple(name for name in self.names() if self._onnx(name).is_file())

    def _export(self, facts: CompanionFacts) -> None:
        folder = self._onnx(facts.network).parent
        source, variant = self._source(facts)
        inputs = {
            "weights": tree_sha256(source / facts.component),
            "facts": digest_of(facts.model_dump(mode="json"), self.target.opset),
        }

        def work() -> list[Made]:
            file = lower_companion(load_companion(source, facts, variant), folder, self.target, self.workspace)
            result = CompanionResult(
                class_name=facts.class_name,
                body=facts.body,
                why_body=facts.why_body,
                usage=facts.usage,
                nodes=file.nodes,
                onnx_bytes=file.bytes,
            )
            audited = audited_layers(file.path, facts, None)
            self._results()[facts.network] = result.model_copy(update=audited)
            return [Made("companion_onnx", path) for path in self.workspace.files(folder, last=file.path)]

        self._run(f"export {facts.network}", f"export:{facts.network}", inputs, work, "export")

    def _build(self, name: CompanionName) -> None:
        path, folder = self._onnx(name), self.workspace.root / name / "engine"
        capabilities = checked_capabilities(self.target, self.model().recipe.compute_capabilities)
        inputs = {"compute_capabilities": ",".join(capabilities)}

        def work() -> list[Made]:
            facts = read_companion_facts(path)
            made = engine_files(folder)
            self.workspace.claim(made)
            options = BuildOptions(target=self.target, io=facts.io, compute_capabilities=capabilities)
            engine, plan = build_engine(path, folder, options, logger.info)
            found = {"engine": engine, **audited_layers(path, facts, plan)}
            self._results()[name] = self._results()[name].model_copy(update=found)
            kinds: tuple[ArtifactKind, ...] = ("companion_engine", "companion_plan", "log")
            return [Made(kind, path) for kind, path in zip(kinds, made, strict=True)]

        self._run(f"build {name}", f"build:{name}", inputs, work, "build")

    def _check(self, names: tuple[CompanionName, ...]) -> list[Made]:
        model, workspace = self.model(), self.workspace
        root = workspace.root
        onnx_path, validation = self.workspace.path("onnx"), model.recipe.validation
        io = read_network_facts(onnx_path).io
        pairs: dict[str, tuple[Companion, OnnxCompanion]] = {}
        for name in names:
            facts = read_companion_facts(self._onnx(name))
            source, variant = self._source(facts)
            pairs[name] = (load_companion(source, facts, variant), OnnxCompanion(self._onnx(name), facts))
        images = min(_IMAGES, validation.images)
        request = SampleRequest(
            prompts=tuple(prompts_for(model.loaded, images, validation.seed)),
            seed=validation.seed,
            steps=model.recipe.calibration.steps,
            guidance_scale=model.recipe.calibration.guidance_scale,
            **sample_size(io),
        )
        denoiser = OnnxDenoiser(onnx_path, io, model.loaded.denoiser)
        trial = try_pipeline(model.loaded, request, denoiser, pairs)
        self.workspace.report.whole_pipeline = trial.result
        made = []
        for name in names:
            companion, file = pairs[name]
            calls = trial.calls[name]
            parity = companion_parity(companion, file, calls)
            self._results()[name] = self._results()[name].model_copy(update={"parity": parity})
            golden = [DenoiserCall(step=0, timestep=0, inputs=call, batch=0) for call in calls[: validation.golden]]
            write_golden(root / name / "golden", self._onnx(name), companion.facts.io, golden, workspace)
            made.append(Made("companion_golden", root / name / "golden"))
        return made

    def _run(
        self, shown: str, stage: str, inputs: dict[str, str], work: Callable[[], list[Made]], kind: str
    ) -> None:
        with self.progress.stage(shown):
            try:
                self.workspace.run_stage(stage, inputs, work, force=kind in self.force)
            except QdExportError as error:
                remedy = "--companions none compiles the denoiser alone"
                raise type(error)(f"{stage.partition(':')[2]}: {error}; {remedy}") from error

    def _source(self, facts: CompanionFacts) -> tuple[Path, str | None]:
        """Where the weights are, and their variant: in the checkpoint, unless it was written without them."""
        checkpoint, loaded = self.workspace.path("checkpoint"), self.model().loaded
        if (checkpoint / facts.component).is_dir() or loaded.folder is None:
            return checkpoint, None
        return loaded.folder, loaded.variant

    def _onnx(self, name: str) -> Path:
        return self.workspace.root / name / "onnx" / MODEL_FILE

    def _results(self) -> dict[CompanionName, CompanionResult]:
        report = self.workspace.report
        if report.companions is None:
            report.companions = {}
        return report.companions

    def _forget(self, names: tuple[CompanionName, ...]) -> None:
        """Removes what an earlier run made of networks that this one leaves out."""
        for stage in self.workspace.lineage.made():
            network = stage.partition(":")[2]
            if network in COMPANION_NAMES and network not in names:
                self.workspace.strike(stage)
        if not names:
            self.workspace.strike("validate:companions")


def audited_layers(path: Path, facts: CompanionFacts, plan: Plan | None) -> dict[str, Any]:
    """Reads the types of weighted layers back from the ONNX file and from the kernel plan.

    Args:
        path: the ONNX file.
        facts: what they should be.
        plan: None when no engine was built.

    Returns:
        ``layers``: how many of them are of which type as planned, in the file and in the engine; ``mismatches``: a
        sentence for each that has another type than planned.
    """
    emitted = {
        item["name"].rpartition("/")[0]: _PRECISIONS.get(item["weight"], item["weight"].lower())
        for item in onnx_facts(path)["layers"]
    }
    compiled = None if plan is None else engine_coverage(plan, list(emitted))
    planned = {layer: facts.body_of(layer) for layer in emitted}
    tables = {"planned": planned, "onnx": emitted, "engine": compiled or {}}
    return {
        "layers": {name: dict(sorted(Counter(table.values()).items())) for name, table in tables.items()},
        "mismatches": floating_mismatches(facts.body, emitted, compiled, plan, planned),
    }
