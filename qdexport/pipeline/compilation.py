"""One compilation: the stages over one output folder, each found again when nothing it depends on changed."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdexport import __version__
from qdexport.build.engine import BuildOptions, build_engine, checked_capabilities, engine_files, require_builder
from qdexport.check.half_range import check_denoiser_range
from qdexport.core.digests import digest_of, tree_sha256
from qdexport.core.environment import environment_facts
from qdexport.core.files import write_text
from qdexport.core.formats import capabilities_for
from qdexport.core.forms import FormTable
from qdexport.core.integrity import damage_of
from qdexport.core.owned import written_into
from qdexport.core.pass_log import PASS_LOG_FILE
from qdexport.core.results import Manifest, Report
from qdexport.errors import OutputError, RecipeError
from qdexport.graph.runner import dump_names
from qdexport.models.companions import find_companions
from qdexport.models.load import load_model
from qdexport.models.source import resolve_source
from qdexport.passes import default_passes
from qdexport.passes.loading import load_pass, with_passes
from qdexport.pipeline.companions import CompanionStages
from qdexport.pipeline.lower import lower_to_onnx, model_io, network_facts
from qdexport.pipeline.ownership import is_place
from qdexport.pipeline.quantize import BIT_PLAN_FILE, QuantizeSettings, discard_calibration, make_quantized, plan_model
from qdexport.pipeline.report import write_report
from qdexport.pipeline.search import FORMS_FILE, SEARCH_FILE, gpu_to_search_on, search_network
from qdexport.pipeline.validate import validate
from qdexport.pipeline.workspace import Made
from qdexport.quant.checkpoint import load_quantized, save_quantized
from qdexport.quant.ranges import load_ranges
from qdexport.search.judge import BuilderJudge
from qdexport.search.results import discard_answers

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink
    from qdexport.core.recipe import Recipe, Validation
    from qdexport.core.results import ArtifactKind
    from qdexport.core.target import Target
    from qdexport.models.loaded import LoadedModel
    from qdexport.pipeline.workspace import Workspace
    from qdexport.quant.attach import QuantizedModel

__all__ = ["STAGES", "Compilation", "CompileOptions", "new_manifest", "new_report"]

logger = logging.getLogger(__name__)

CALIBRATION_FOLDER = ".calibration"
SEARCH_FOLDER, SEARCH_CACHE = "search", ".search"
STAGES = ("quantize", "search", "export", "build", "validate")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What to compile.

    Attributes:
        model: a bundled name, a diffusers folder, or a hub id.
        recipe: the whole recipe.
        target: where it will run.
        variant: of the model's weight files (``fp16``).
        ranges: a file of activation ranges; the model is then not sampled for calibration.
        copy_weights: store the floating-point weights in the checkpoint, or only where they are.
        force: stages to do anew although nothing changed; what is kept of them for resuming is not used.
        dump_passes: folder for the graph after each pass.
        extra_passes: passes of the user's, ``FILE.py:Class``.
        forms: a table of the forms of operators; None: the one that comes with qdexport.
        gpu: whose rates judge a search; None: a card of the recipe's first compute capability.
        workers: processes that measure sensitivities; None: one per core.
        ray: address of a Ray cluster that measures them instead.
    """

    model: str
    recipe: Recipe
    target: Target
    variant: str | None = None
    ranges: Path | None = None
    copy_weights: bool = True
    quick: bool = False
    force: frozenset[str] = frozenset()
    dump_passes: Path | None = None
    extra_passes: tuple[str, ...] = ()
    forms: Path | None = None
    gpu: str | None = None
    workers: int | None = None
    ray: str | None = None


def new_manifest(options: CompileOptions) -> Manifest:
    """The header of the output folder's manifest."""
    return Manifest(
        tool_version=__version__,
        model=options.model,
        recipe_digest=options.recipe.digest(),
        target=options.target.name,
        environment=environment_facts(),
    )


def new_report(options: CompileOptions) -> Report:
    """The header of the output folder's report."""
    return Report(tool_version=__version__, model=options.model, recipe=options.recipe.name, target=options.target.name)


class Compilation:
    """Runs stages over a workspace.

    Args:
        options: what to compile.
        workspace: an open output folder.
        progress: where progress is shown.
    """

    def __init__(self, options: CompileOptions, workspace: Workspace, progress: ProgressSink) -> None:
        self.options = replace(options, target=options.target.with_opset(options.recipe.opset))
        self.workspace = workspace
        self.progress = progress
        self._model: QuantizedModel | None = None

    def check(self) -> None:
        """Refuses what cannot work before anything long is started.

        Raises:
            RecipeError: the target does not build for a compute capability, one cannot compute with a format of the
                recipe, or the target cannot run the body's type; a pass of
                the user's cannot be used.
            GraphPassError: the file of a pass of the user's cannot be executed.
            MissingDependencyError: the target's builder is not installed.
        """
        with_passes(default_passes(), [load_pass(source) for source in self.options.extra_passes])
        recipe, target = self.options.recipe, self.options.target
        if recipe.body != "auto" and recipe.body not in target.bodies:
            raise RecipeError(
                f"target {target.name} cannot run a {recipe.body} body; it can: {', '.join(target.bodies)}"
            )
        if target.module is not None:
            self._capabilities()
            require_builder(target)
        if recipe.search:
            BuilderJudge(target, gpu_to_search_on(self.options.gpu, recipe.compute_capabilities))

    def compile(self) -> None:
        """All stages, in order."""
        self.check()
        with self._dumps():
            self._compile()

    def _dumps(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the folder for the graphs of passes to this run; refuses it where it would write over files."""
        folder, passes = self.options.dump_passes, list(default_passes())
        if folder is None:
            return contextlib.nullcontext()
        if is_place(self.workspace.root, folder):
            raise RecipeError(f"--dump-passes {folder} is a folder of the output itself; name another one")
        extra = [load_pass(source) for source in self.options.extra_passes]
        return written_into(folder, dump_names(with_passes(passes, extra)))

    def _compile(self) -> None:
        self.quantize()
        if self.options.recipe.search:
            self.search()
        else:
            self.workspace.strike("search")
        self.export()
        if self.options.target.module is not None:
            self.build()
        self.validate()
        self.report()

    def quantize(self) -> None:
        """Calibrates and writes ``checkpoint/``."""
        recipe, options = self.options.recipe, self.options
        _, folder = resolve_source(options.model, options.variant)
        inputs = {
            "model": tree_sha256(folder),
            "variant": options.variant or "",
            "recipe": _quantize_digest(recipe),
            "ranges": tree_sha256(options.ranges) if options.ranges else "",
            "bit_plan": _file_digest(recipe.bit_plan),
            "prompts": _file_digest(recipe.calibration.prompts_file),
            # bits that are allocated for a time or a size are those of a target
            "allocated_for": options.target.name if recipe.bit_allocation is not None else "",
        }
        checkpoint = self.workspace.root / "checkpoint"

        def work() -> list[Made]:
            self._refuse_edited_plan(recipe)
            if "quantize" in options.force:
                discard_calibration(self.workspace.root / CALIBRATION_FOLDER)
            loaded = load_model(options.model, variant=options.variant)
            find_companions(loaded, recipe.companions)  # what is not there is better known now
            self._model = make_quantized(loaded, recipe, self._settings(loaded), self.progress)
            check_denoiser_range(self._model)
            network_facts(self._model, options.target)  # a schedule that is missing is better known now
            save_quantized(
                self._model, checkpoint, with_weights=options.copy_weights, owner=self.workspace
            )
            self.workspace.manifest.calibrated_with(self._model.threads)
            return [Made("checkpoint", checkpoint)]

        with self.progress.stage("quantize"):
            if not self.workspace.run_stage("quantize", inputs, work, force="quantize" in options.force):
                self._keep_bit_plan(recipe)

    def _allocates(self, recipe: Recipe) -> bool:
        return recipe.bit_allocation is not None and recipe.bit_plan is None and self.options.ranges is None

    def _refuse_edited_plan(self, recipe: Recipe) -> None:
        """Refuses to work towards a new ``bits.yaml`` over one that its user has edited."""
        root, item = self.workspace.root, self.workspace.manifest.artifact("bit_plan")
        path, found = root / BIT_PLAN_FILE, root / CALIBRATION_FOLDER / BIT_PLAN_FILE
        if not self._allocates(recipe) or item is None or not path.is_file() or not damage_of(root, item):
            return
        if _file_digest(str(path)) != _file_digest(str(found)):  # equal: a run was stopped before it noted the plan
            raise OutputError(
                f"{path} was changed since qdexport wrote it: use it with --set bit_plan={path}, or move it elsewhere"
            )

    def _keep_bit_plan(self, recipe: Recipe) -> None:
        """Puts an allocated plan where users look for it; ``bit_plan: OUT/bits.yaml`` feeds an edited one back."""
        workspace, found = self.workspace, self.workspace.root / CALIBRATION_FOLDER / BIT_PLAN_FILE
        if self._allocates(recipe) and found.is_file():
            path = workspace.root / BIT_PLAN_FILE
            workspace.claim([path])
            write_text(path, found.read_text(encoding="utf-8"))
            workspace.record("bits", workspace.inputs("bits"), [Made("bit_plan", path)])

    def search(self) -> None:
        """Finds the form of every operator by building blocks, and writes ``search/``.

        Raises:
            RecipeError: the target has no builder, or shapes are dynamic.
        """
        root, options = self.workspace.root, self.options
        gpu = gpu_to_search_on(options.gpu, options.recipe.compute_capabilities)
        inputs = {"gpu": gpu.name, "forms": _table_digest(options)}

        def work() -> list[Made]:
            folder = root / SEARCH_FOLDER
            if "search" in options.force:
                discard_answers(root / SEARCH_CACHE)
            start = FormTable.load(options.forms) if options.forms else None
            self.workspace.claim([folder / SEARCH_FILE, folder / FORMS_FILE])
            search_network(
                self.model, options.target, gpu, folder, root / SEARCH_CACHE, start=start, progress=self.progress
            )
            return [Made("log", folder / SEARCH_FILE), Made("forms", folder / FORMS_FILE)]

        with self.progress.stage("search"):
            self.workspace.run_stage("search", inputs, work, force="search" in options.force)

    def _forms(self) -> Path | None:
        """The table that the network is written with: what a search found, or what was given."""
        if self.options.recipe.search:
            return self.workspace.root / SEARCH_FOLDER / FORMS_FILE
        return self.options.forms

    def export(self) -> None:
        """Lowers the fake-quant model and writes ``onnx/``, and the same for the networks beside the denoiser."""
        folder = self.workspace.root / "onnx"
        forms = self._forms()
        inputs = {
            "opset": str(self.options.target.opset),
            "passes": digest_of(*map(_pass_digest, self.options.extra_passes)),
            "forms": _table_digest(self.options),
        }

        def work() -> list[Made]:
            extra = [load_pass(source) for source in self.options.extra_passes]
            table = FormTable.load(forms) if forms else None
            options = self.options
            lowered = lower_to_onnx(
                self.model, folder, options.target, options.dump_passes, extra, table, owner=self.workspace
            )
            self.workspace.manifest.profiles = lowered.facts.io.profile_shapes()
            files = self.workspace.files(folder, last=lowered.file.path)
            return [Made("log" if path.name == PASS_LOG_FILE else "onnx", path) for path in files]

        with self.progress.stage("export"):
            self.workspace.run_stage("export", inputs, work, force="export" in self.options.force)
        self.companions.export()

    def build(self) -> None:
        """Compiles the ONNX file and writes ``engine/``, and the same for the networks beside the denoiser."""
        folder = self.workspace.root / "engine"
        capabilities, note = self._capabilities()
        inputs = {"compute_capabilities": ",".join(capabilities)}

        def work() -> list[Made]:
            build = BuildOptions(
                target=self.options.target,
                io=model_io(self.model),
                compute_capabilities=capabilities,
            )
            made = engine_files(folder)
            self.workspace.claim(made)
            facts, _ = build_engine(self.workspace.path("onnx"), folder, build, logger.info)
            self.workspace.report.engine = facts
            if note and note not in self.workspace.report.notes:
                self.workspace.report.notes.append(note)
            kinds: tuple[ArtifactKind, ...] = ("engine", "plan", "log")
            return [Made(kind, path) for kind, path in zip(kinds, made, strict=True)]

        with self.progress.stage("build"):
            self.workspace.run_stage("build", inputs, work, force="build" in self.options.force)
        self.companions.build()

    def validate(self) -> None:
        """Compares every artefact with what was planned; writes ``images/`` and ``golden/``."""
        inputs = {"validation": digest_of(self._validation().model_dump(), self.options.quick)}
        with self.progress.stage("validate"):
            self.workspace.run_stage(
                "validate",
                inputs,
                lambda: validate(self._to_check(), self.workspace, self.progress, quick=self.options.quick),
                force="validate" in self.options.force,
            )
        replace(self.companions, model=self._to_check).validate()

    def _validation(self) -> Validation:
        validation = self.options.recipe.validation
        return validation.quick() if self.options.quick else validation

    def _to_check(self) -> QuantizedModel:
        """The model with what of it is to be checked."""
        recipe = self.model.recipe.model_copy(update={"validation": self._validation()})
        return replace(self.model, recipe=recipe)

    def report(self) -> None:
        """Writes ``report.html`` from what is known, and saves report and manifest."""
        with self.progress.stage("report"):
            write_report(self.model, self.workspace)

    def _capabilities(self) -> tuple[tuple[str, ...], str]:
        """What the engine is built for, and a sentence about what of the target's default it is not built for."""
        recipe, target = self.options.recipe, self.options.target
        return capabilities_for(recipe, target, checked_capabilities(target, recipe.compute_capabilities))

    @property
    def companions(self) -> CompanionStages:
        """The stages of the networks beside the denoiser."""
        return CompanionStages(
            workspace=self.workspace,
            model=lambda: self.model,
            target=self.options.target,
            force=self.options.force,
            progress=self.progress,
        )

    @property
    def model(self) -> QuantizedModel:
        """The fake-quant model: of this run, or read from the checkpoint."""
        if self._model is None:
            self._model = load_quantized(self.workspace.path("checkpoint"))
        return self._model

    def _settings(self, loaded: LoadedModel) -> QuantizeSettings:
        options = self.options
        ranges = None
        if options.ranges is not None:
            ranges = load_ranges(options.ranges, plan_model(loaded, options.recipe))
        return QuantizeSettings(
            target=options.target,
            folder=self.workspace.root / CALIBRATION_FOLDER,
            ranges=ranges,
            workers=options.workers,
            ray=options.ray,
        )


def _pass_digest(source: str) -> str:
    """A pass of the user's is known by its file's contents and the name of its class."""
    file, _, name = source.rpartition(":")
    return f"{_file_digest(file)}:{name}"


def _table_digest(options: CompileOptions) -> str:
    return tree_sha256(options.forms) if options.forms else ""


def _file_digest(path: str | None) -> str:
    return tree_sha256(Path(path)) if path is not None and Path(path).is_file() else ""


def _quantize_digest(recipe: Recipe) -> str:
    """What the checkpoint depends on; shapes and validation do not change it, but it stores the whole recipe. A search
    asks for nothing but work on the graph, so that a network that is calibrated can be searched later.
    """
    return digest_of(recipe.model_dump(mode="json", exclude={"search"}))
