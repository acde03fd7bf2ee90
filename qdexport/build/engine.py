"""Builds one engine: options are checked, the builder runs in a child, the plan is read back from its log."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdexport.build.child import CANNOT_WRITE
from qdexport.build.diagnose import FailedBuild, explain
from qdexport.build.plan import kernel_counts, parse_plan
from qdexport.build.process import BuildJob, run_child
from qdexport.core.files import atomic_path
from qdexport.core.results import EngineFacts, Plan, ProfileFacts
from qdexport.core.writing import unexplained_failure, write_failure
from qdexport.errors import BuildError, MissingDependencyError, OutputError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qdexport.build.child import BuildResult
    from qdexport.build.process import ChildRun
    from qdexport.core.io_spec import IoSpec
    from qdexport.core.target import Target

__all__ = ["BuildOptions", "build_engine", "checked_capabilities", "engine_files", "require_builder"]

logger = logging.getLogger(__name__)

_DEVICES = {
    "7.5": "Turing",
    "8.7": "Jetson Orin",
    "9.0": "H100, H200",
    "10.0": "B200",
    "11.0": "Jetson Thor",
    "12.1": "GB10",
}
_EXTRAS = {"tensorrt_rtx": "cpu", "tensorrt": "gpu"}
_CANNOT_WRITE = re.compile(r"^ERROR: cannot write (.+): \[Errno (\d+)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build.

    Attributes:
        target: the row of the capability table.
        io: inputs of the network, and its optimization profiles.
        compute_capabilities: those that the engine must run on; empty means the target's default.
        timeout_s: the builder is stopped after this many seconds; None waits for ever.
    """

    target: Target
    io: IoSpec
    compute_capabilities: tuple[str, ...] = ()
    timeout_s: float | None = None


def checked_capabilities(target: Target, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The compute capabilities to build for: what was asked for, or the target's default.

    Raises:
        RecipeError: the target does not build for one of them; the message says which target does.
    """
    if not wanted:
        return target.default_compute_capabilities
    if not target.compute_capabilities:
        raise RecipeError(
            f"target {target.name} builds for the GPU of the machine it runs on: remove compute_capabilities "
            f"({', '.join(wanted)}) from the recipe, and build on a machine with that GPU"
        )
    for capability in wanted:
        if capability not in target.compute_capabilities:
            raise RecipeError(_no_capability(target, capability))
    return tuple(dict.fromkeys(wanted))


def require_builder(target: Target) -> str:
    """The builder module of a target, looked for but not imported.

    Raises:
        RecipeError: the target has none.
        MissingDependencyError: it is not installed; the message names the extra to install.
    """
    if target.module is None:
        raise RecipeError(
            f"target {target.name} has no engine builder: the ONNX file is what runs; skip the build stage"
        )
    if importlib.util.find_spec(target.module) is not None:
        return target.module
    extra = _EXTRAS.get(target.module)
    command = f"pip install 'qdexport[{extra}]'" if extra else f"pip install {target.module}"
    raise MissingDependencyError(
        f"target {target.name} needs the Python package {target.module}, which is not installed: {command}"
    )


def build_engine(
    onnx_path: Path, out_dir: Path, options: BuildOptions, on_progress: Callable[[str], None] | None = None
) -> tuple[EngineFacts, Plan]:
    """Compiles an ONNX file and writes ``model.engine``, ``plan.json`` and ``build.log`` to ``out_dir``.

    Each file is whole or absent. When the build fails, the log is kept and nothing else changes.

    Args:
        onnx_path: the ONNX file; its external data is looked for beside it.
        out_dir: made when absent.
        options: target, shapes, capabilities and time limit.
        on_progress: called with a short sentence when the builder's phase changes, and every ten seconds.

    Returns:
        Size, time, memory and kernel counts, and the kernel plan.

    Raises:
        RecipeError: the options do not fit the target.
        MissingDependencyError: the builder or the GPU that it needs is missing.
        BuildError: the builder rejected the graph, crashed or was killed; the message names the module.
        OutputError: ``out_dir`` cannot be written.
    """
    module = require_builder(options.target)
    capabilities = checked_capabilities(options.target, options.compute_capabilities)
    if not onnx_path.is_file():
        raise BuildError(f"there is no ONNX file {onnx_path}; run the export stage first")
    engine_path, plan_path, log_path = engine_files(out_dir)
    with atomic_path(engine_path) as engine:
        with atomic_path(log_path) as log:
            job = BuildJob(
                module=module,
                versions=options.target.builder_versions,
                onnx=onnx_path,
                engine=engine,
                log=log,
                compute_capabilities=capabilities,
                profiles=tuple(options.io.profile_shapes().values()),
                needs_gpu=options.target.needs_gpu_to_build,
                timeout_s=options.timeout_s,
            )
            run = run_child(job, on_progress)
        if run.success is None:
            raise _failure(run, onnx_path, log_path, options)
        plan = parse_plan(log_path.read_text(encoding="utf-8", errors="replace"), options.target.name)
        facts = _facts(run.success, plan, options.io)
    plan.save(plan_path)
    logger.info("built %s: %d bytes, %d kernels", engine_path, facts.bytes, facts.kernels)
    return facts, plan


def engine_files(out_dir: Path) -> list[Path]:
    """What :func:`build_engine` writes: the engine, its kernel plan, the builder's log."""
    return [out_dir / "model.engine", out_dir / "plan.json", out_dir / "build.log"]


def _cannot_write(log: Path) -> OutputError:
    """What the builder could not write: the last line of its log says it, unless it was the log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    told = _CANNOT_WRITE.findall(text)
    if not told:
        return unexplained_failure(log)
    path, number = Path(told[-1][0]), int(told[-1][1])
    place = log.parent if path.name.startswith(".") else path  # a temporary name means nothing to a user
    return write_failure(OSError(number, os.strerror(number)), place) or unexplained_failure(place)


def _failure(run: ChildRun, onnx_path: Path, log_path: Path, options: BuildOptions) -> Exception:
    if run.returncode == CANNOT_WRITE:
        return _cannot_write(log_path)
    target = options.target
    if run.result is not None and run.result["stage"] == "gpu":
        return MissingDependencyError(
            f"target {target.name} builds its engine on the GPU that runs it, but "
            f"{run.result['errors'][0]['text']}; build on a machine with that GPU, or choose target "
            "tensorrt-rtx, which builds on a CPU"
        )
    if run.result is not None and run.result["stage"] == "import":
        return MissingDependencyError(
            f"the builder of target {target.name} cannot be used: {run.result['errors'][0]['text']}"
        )
    failed = FailedBuild(
        builder=target.name, run=run, onnx_path=onnx_path, log_path=log_path, timeout_s=options.timeout_s
    )
    return BuildError(explain(failed))


def _facts(result: BuildResult, plan: Plan, io: IoSpec) -> EngineFacts:
    counts = kernel_counts(plan)
    return EngineFacts(
        target=plan.target,
        compute_capabilities=result["compute_capabilities"],
        bytes=result["bytes"],
        kernels=counts.kernels,
        kernels_by_type=counts.by_type,
        int8_compute=counts.int8_compute,
        fp8_compute=counts.fp8_compute,
        nvfp4_compute=counts.nvfp4_compute,
        fp_compute=counts.fp_compute,
        attention_kernels=counts.attention_kernels,
        build_seconds=round(result["seconds"], 3),
        peak_rss_mb=round(result["peak_rss_mb"], 1),
        builder_version=result["builder_version"],
        profiles=_profiles(plan, io),
    )


def _profiles(plan: Plan, io: IoSpec) -> list[ProfileFacts]:
    """Shapes and kernels of every optimization profile; a kernel of no profile runs in each."""
    found = []
    for index, (name, shapes) in enumerate(io.profile_shapes().items()):
        mine = [kernel for kernel in plan.kernels if kernel.profile == index]
        counts = kernel_counts(plan.model_copy(update={"kernels": mine}))
        found.append(
            ProfileFacts(
                name=name,
                shapes=shapes,
                kernels=counts.kernels,
                int8_compute=counts.int8_compute,
                fp_compute=counts.fp_compute,
                attention_kernels=counts.attention_kernels,
            )
        )
    return found


def _no_capability(target: Target, capability: str) -> str:
    known = ", ".join(target.compute_capabilities)
    if not re.fullmatch(r"\d+\.\d", capability):
        return f"compute capability {capability!r} must be written like 8.9; target {target.name} has {known}"
    device = f" ({_DEVICES[capability]})" if capability in _DEVICES else ""
    remedy = "use target tensorrt on a machine with that GPU"
    if capability == "7.5":
        remedy = "an engine that also holds 7.5 would compute all INT8 convolutions in FP16; " + remedy
    refusal = f"target {target.name} does not build for compute capability {capability}{device}"
    return f"{refusal}; it has {known}; {remedy}"
