"""``qdexport compile`` and its single stages: quantize, export, build, validate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from qdexport.cli.console import make_console, make_progress, print_json
from qdexport.cli.explain import show_explanation
from qdexport.cli.options import (
    common,
    folder_argument,
    form_options,
    out_option,
    overrides_of,
    quick_option,
    recipe_options,
    target_option,
    worker_options,
)
from qdexport.core.shown import one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qdexport.pipeline.compilation import Compilation, CompileOptions
    from qdexport.pipeline.workspace import Workspace

__all__ = ["build", "compile_", "export", "out_folder", "prepared_options", "quantize", "run_stages", "validate"]

_STAGES = ["quantize", "search", "export", "build", "validate"]
_VERDICT_FAILED = 8
Shown = Literal["report", "next", "nothing"]


@click.command(
    "compile",
    epilog="""\b
Examples:
  qdexport compile shapes                                  the bundled model, W8A8, TensorRT-RTX
  qdexport compile ./my-sd --recipe w8a8-timestep --body fp16 --out out
  qdexport compile runwayml/stable-diffusion-v1-5 --recipe my.yaml --set calibration.prompts=64
  qdexport compile shapes --force build                    build again although nothing changed
  qdexport compile shapes --explain conv_in                what every compiler pass did to a layer
  qdexport compile shapes --companions none                the denoiser alone, without text encoder and VAE
  qdexport compile ./my-sd --search --gpu rtx-4090         find the best form of every operator first
""",
)
@click.argument("model")
@recipe_options
@worker_options
@form_options
@target_option
@out_option
@click.option(
    "--search", is_flag=True, help="First build blocks in several forms, and write every operator in the best one."
)
@click.option("--force", "force", multiple=True, type=click.Choice(_STAGES), help="Do this stage anew; repeatable.")
@quick_option
@click.option("--dump-passes", type=click.Path(file_okay=False), help="Write the graph after each pass to this folder.")
@click.option("--pass", "extra_passes", multiple=True, metavar="FILE.py:CLASS", help="Also run a pass of your own.")
@click.option("--explain", metavar="LAYER", help="In the end, say what every compiler pass did to a layer.")
@common
def compile_(model: str, **options: Any) -> None:
    """Quantize, export, build and check MODEL: a bundled name, a diffusers folder or a hub id.

    The denoiser is quantized; the text encoders and the VAE's decoder are compiled beside it in FP16.
    Writes an output folder with checkpoint, ONNX files, engines, images, report.html and report.json. A second run
    does only what changed; an interrupted one continues. Ends with code 8 when the
    network is not compiled right, or its pictures are not kept.
    """
    prepared = prepared_options(model, options)
    out = out_folder(prepared, options["out"])
    failed = run_stages(prepared, out, options, lambda job: job.compile())
    if options["explain"]:
        show_explanation(out, options["explain"])
    if failed:
        raise SystemExit(_VERDICT_FAILED)


@click.command(
    epilog="""\b
Example:
  qdexport quantize shapes --recipe w8a8-asym --out out
"""
)
@click.argument("model")
@recipe_options
@worker_options
@target_option
@out_option
@click.option("--force", is_flag=True, help="Calibrate from the start although nothing changed.")
@common
def quantize(model: str, **options: Any) -> None:
    """Calibrate MODEL and write the fake-quant checkpoint: a diffusers folder plus quantization.safetensors."""
    options["force"] = ("quantize",) if options["force"] else ()
    prepared = prepared_options(model, options)
    run_stages(prepared, out_folder(prepared, options["out"]), options, lambda job: job.quantize(), show="next")


def _stage_command(name: str, help_text: str, *more: Callable[[Any], Any]) -> click.Command:
    @click.command(name, help=help_text, epilog=f"\b\nExample:\n  qdexport {name} out")
    @folder_argument
    @click.option("--target", help="Default: the folder's own.")
    @click.option("--force", is_flag=True, help="Do it again although nothing changed.")
    @common
    def command(folder: Path, **options: Any) -> None:
        force = (name,) if options["force"] else ()
        prepared = _continued_options(folder, options["target"], force, quick=options.get("quick", False))

        def stage(job: Compilation) -> None:
            getattr(job, name)()
            if name == "validate":
                job.report()

        show: Shown = "report" if name == "validate" else "next"
        if run_stages(prepared, folder, options, stage, show=show, heal=False) and name == "validate":
            raise SystemExit(_VERDICT_FAILED)

    for option in more:
        command = option(command)
    return command


export = _stage_command("export", "Lower the checkpoint in OUT to type-exact ONNX files.")
build = _stage_command("build", "Compile the ONNX files in OUT to engines, in child processes.")
validate = _stage_command(
    "validate",
    "Check everything in OUT: parity layer by layer, noise floor, images, plan audit. Ends with code 8 when the "
    "network is not compiled right, or its pictures are not kept.",
    quick_option,
)


def prepared_options(model: str, options: dict[str, Any]) -> CompileOptions:
    """What the options of a command say."""
    from pathlib import Path

    from qdexport.core.recipe import load_recipe
    from qdexport.core.target import target_named

    overrides = overrides_of(
        options["assignments"],
        options["body"],
        allow_re_rounding=options["allow_re_rounding"],
        opset=options["opset"],
        companions=options["companions"],
        search=options.get("search", False),
    )
    dump = options.get("dump_passes")
    recipe = load_recipe(options["recipe"], overrides)  # before the slow imports: most mistakes are here
    from qdexport.pipeline.compilation import CompileOptions

    return CompileOptions(
        model=model,
        recipe=recipe,
        target=target_named(options["target"]),
        variant=options["variant"],
        ranges=options["ranges"],
        quick=options.get("quick", False),
        force=frozenset(options["force"]),
        dump_passes=Path(dump) if dump else None,
        extra_passes=tuple(options.get("extra_passes", ())),
        forms=options.get("forms"),
        gpu=options.get("gpu"),
        workers=options["workers"],
        ray=options["ray"],
    )


def _continued_options(
    folder: Path, target: str | None, force: tuple[str, ...], *, quick: bool = False
) -> CompileOptions:
    from qdexport.core.recipe import load_recipe
    from qdexport.core.results import Manifest
    from qdexport.core.target import target_named
    from qdexport.pipeline.compilation import CompileOptions
    from qdexport.pipeline.lineage import check_checkpoint
    from qdexport.pipeline.workspace import settle

    settle(folder)
    manifest = Manifest.load(folder / "manifest.json")
    check_checkpoint(folder, manifest)
    recipe = folder / "checkpoint" / "recipe.yaml"
    return CompileOptions(
        model=manifest.model,
        recipe=load_recipe(str(recipe), {"search": any(item.stage == "search" for item in manifest.artifacts)}),
        target=target_named(target or manifest.target),
        quick=quick,
        force=frozenset(force),
    )


def out_folder(prepared: CompileOptions, given: Path | None) -> Path:
    """The folder that was asked for, or one by model and recipe."""
    from pathlib import Path

    from qdexport.core.paths import as_file_name

    if given is not None:
        return given
    model = Path(prepared.model)
    name = model.resolve().name if model.is_dir() else prepared.model.rstrip("/").rsplit("/", 1)[-1]
    return Path("qdexport-out") / f"{as_file_name(name, 'model')}-{as_file_name(prepared.recipe.name, 'recipe')}"


def run_stages(
    prepared: CompileOptions,
    out: Path,
    options: dict[str, Any],
    stages: Callable[[Compilation], None],
    *,
    show: Shown = "report",
    heal: bool = True,
) -> bool:
    """Runs stages over an output folder; returns whether a check failed.

    Args:
        prepared: what to compile.
        out: the output folder.
        options: of the command.
        stages: are run.
        show: the report, or the command that goes on where a stage is still to be done, or nothing.
        heal: begin a new manifest where the folder's is damaged.
    """
    from qdexport.check.outcome import failed, verdict_of
    from qdexport.pipeline.compilation import Compilation, new_manifest, new_report
    from qdexport.pipeline.lineage import next_command
    from qdexport.pipeline.workspace import Workspace

    progress = make_progress(options["verbose"], options["as_json"])
    with Workspace.open(out, new_manifest(prepared), new_report(prepared), heal=heal) as workspace:
        job = Compilation(prepared, workspace, progress)
        stages(job)
        workspace.report.verdict = verdict_of(workspace.report)
        workspace.save()
        following = None
        if show == "next":
            following = next_command(out, workspace.manifest, builds=prepared.target.module is not None)
        if show != "nothing":
            _show(workspace, following, as_json=options["as_json"])
        return failed(workspace.report)


def _show(workspace: Workspace, following: str | None, *, as_json: bool) -> None:
    from qdexport.report.terminal import summary

    if as_json:
        print_json(workspace.report.model_dump(mode="json", exclude_none=True))
    elif following is not None:
        report, done = workspace.report, ", ".join(workspace.report.stages)
        click.echo(one_line(f"{report.model}, {report.recipe}, {report.target}: done so far: {done}."))
        click.echo(f"Nothing is compared yet. Next: {one_line(following)}")
    else:
        summary(workspace.report, make_console(), workspace.root)
