"""Takes UNets of real sizes with random weights through the whole compiler, and measures time and memory."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from benchmarks.scale import MODELS, ScaleJob, run_scale
from qdexport.core.recipe import load_recipe
from qdexport.core.target import target_named
from qdexport.errors import INTERRUPTED_EXIT_CODE, QdExportError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """\b
Examples:
  python tools/bench_scale.py                                     unet50m and sd15, W8A8
  python tools/bench_scale.py --model sd15 --recipe w8a8-timestep --json
  python tools/bench_scale.py --model sdxl --out out/sdxl         keep the files (16 GB of disk)
  python tools/bench_scale.py --model sd15 --set shapes.batch=4
"""
# its FP16 plan takes more memory to build than all else here
_TOO_LARGE = ("sdxl",)


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=("unet50m", "sd15"),
              show_default=True, help="Size of UNet; repeatable.")
@click.option("--recipe", default="w8a8", show_default=True, help="A preset or a .yaml file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe.")
@click.option("--capability", "capabilities", multiple=True, metavar="X.Y", default=("8.9",), show_default=True,
              help="Compute capability of the engine; repeatable.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Sampling steps (DDIM).")
@click.option("--seed", default=0, show_default=True, help="Chooses the activation ranges.")
@click.option("--fp16-baseline/--no-fp16-baseline", default=None,
              help="Also build the same UNet in FP16 and count its kernels.  [default: yes, but not for sdxl]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs, engines and logs here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(  # noqa: PLR0913  one argument per option
    models: tuple[str, ...],
    recipe: str,
    assignments: tuple[str, ...],
    capabilities: tuple[str, ...],
    steps: int,
    seed: int,
    fp16_baseline: bool | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Quantize UNets of real sizes (random weights, FP16, given activation ranges), export and build them for
    TensorRT-RTX, and show what it takes.

    Exporter and builder each run in a process of their own; peak memory is that of the larger one. With several
    models the JSON object holds a list under "models".
    """
    from qdexport.cli.progress import Progress

    chosen = load_recipe(recipe, _overrides(assignments))
    progress = Progress(quiet=as_json)
    results = []
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="qdexport-bench-") as folder:
        for model in dict.fromkeys(models):
            job = ScaleJob(
                model=model,
                recipe=chosen,
                target=target_named("tensorrt-rtx"),
                capabilities=capabilities,
                steps=steps,
                seed=seed,
                fp16_baseline=model not in _TOO_LARGE if fp16_baseline is None else fp16_baseline,
                folder=Path(folder),
            )
            results.append(run_scale(job, progress))
    if as_json:
        click.echo(json.dumps(results[0] if len(results) == 1 else {"models": results}, indent=2))
    else:
        _show(results)


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
    values = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise RecipeError(f"--set {assignment!r} is not KEY=VALUE")
        values[key] = yaml.safe_load(text)
    return values


def _show(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0]['recipe']}, {', '.join(results[0]['compute_capabilities'])}")
    rows: dict[str, list[str]] = {
        "parameters (M)": [f"{r['parameters'] / 1e6:,.1f}" for r in results],
        "time (s)": [f"{r['seconds']:.0f}" for r in results],
        "  import, weights": [_seconds(r, "import", "load") for r in results],
        "  quantize": [_seconds(r, "quantize") for r in results],
        "  export": [_seconds(r, "export") for r in results],
        "  build": [_seconds(r, "build") for r in results],
        "peak memory (GB)": [_gigabytes(r["peak_rss_mb"]) for r in results],
        "  export": [_gigabytes(r["stages"]["export"]["peak_rss_mb"]) for r in results],
        "  build": [_gigabytes(r["stages"]["build"]["peak_rss_mb"]) for r in results],
    }
