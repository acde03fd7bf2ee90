"""Measures how good the images of quantized models are: every recipe on the bundled models, or your own pipeline."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from benchmarks.command import run_command

from qdexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from benchmarks.quality_rows import Row, RowEntry
    from benchmarks.quality_table import Settings, Table
    from rich.console import Console

_ROOT = Path(__file__).resolve().parents[1]
_ROWS = Path(__file__).resolve().parent / "benchmarks" / "quality_rows.yaml"
_FAILED_EXIT_CODE = 1
_FILE_WIDTH = 150
_CAPTIONS = {
    "pictures/quality-errors.png": "Image MSE to FP of each row, with its 95 % interval",
    "pictures/quality-steps.png": (
        "Squared error of the latents against the steps done, each model on its own trajectory"
    ),
    "pictures/quality-images.png": "The first prompts, the same noise in every line",
}
_EXAMPLES = """\b
Examples:
  python tools/bench_quality.py --list
  python tools/bench_quality.py --group baselines
  python tools/bench_quality.py --row 'mse-w4a4*' --images 64
  python tools/bench_quality.py --write-docs                 docs/quality.md, quality.json, pictures
  python tools/bench_quality.py --row w8a8 --update-docs     measures it anew, and replaces its row
  python tools/bench_quality.py --reuse --json > quality.json
  python tools/bench_quality.py --model ./my-sd --prompts prompts.txt --recipe w8a8 --recipe w4a8 --real ./photos
"""


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), default=_ROWS, help="File of rows.")
@click.option("--group", "groups", multiple=True, help="Only rows of this group; repeatable.")
@click.option("--row", "names", multiple=True, metavar="GLOB", help="Only rows with such names; repeatable.")
@click.option("--list", "only_list", is_flag=True, help="List the rows and measure nothing.")
@click.option("--write-docs", is_flag=True, help="Write docs/quality.md, docs/quality.json and their plots.")
@click.option("--update-docs", is_flag=True, help="The same for the chosen rows alone; plots and other rows stay.")
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    default=_ROOT / "docs",
    help="Where --write-docs and --update-docs write.",
)
@click.option("--model", help="A pipeline of your own: bundled name, diffusers folder or hub id.")
@click.option("--prompts", type=click.Path(dir_okay=False, path_type=Path), help="One prompt per line, for --model.")
@click.option("--recipe", "recipes", multiple=True, help="A preset or a .yaml file, for --model; repeatable.")
@click.option("--real", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Real images, for --model.")
@click.option(
    "--inception", type=click.Path(dir_okay=False, path_type=Path), help="Weights of torch-fidelity's Inception."
)
@click.option(
    "--clip", default="openai/clip-vit-base-patch16", show_default=True, help="CLIP model in the hub's cache."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Noise of --model's images.")
@click.option("--images", type=click.IntRange(2), help="At most so many images per row.")
@click.option("--steps", type=click.IntRange(1), help="Sampler steps.  [default: the model's]")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the model's]")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images sampled at once.")
@click.option("--workers", type=click.IntRange(1), help="Rows measured at once.  [default: cores over --threads]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of PyTorch in each.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".bench-quality"),
    show_default=True,
    help="Where images are kept.",
)
@click.option("--reuse", is_flag=True, help="Take images that older code of qdexport made.")
@click.option(
    "--real-images", default=20_000, show_default=True, type=click.IntRange(2), help="Renders of real images."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> int:
    """Sample images with quantized models and with FP, from the same prompts and noise, and compare them.

    Rows are sampled in processes of their own and kept on disk: interrupted, the next run goes on where this one was.
    Without --model the rows of tools/benchmarks/quality_rows.yaml are measured.
    """
    given = {name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    _refuse_mixed(given, user=options["model"] is not None)
    settings = _settings(options)
    if options["model"] is not None:
        return _run_user(options, settings)
    return _run_table(options, settings)


def _refuse_mixed(given: set[str], *, user: bool) -> None:
    own = {"prompts", "recipes", "real", "inception", "clip", "seed"}
    table = {"rows_path", "groups", "names", "only_list", "write_docs", "update_docs", "docs", "real_images"}
    wrong = sorted(given & (table if user else own))
    if wrong:
        flags = ", ".join(f"--{_FLAGS.get(name, name.replace('_', '-'))}" for name in wrong)
        raise RecipeError(f"{flags} {'does not go with' if user else 'needs'} --model")


_FLAGS = {"rows_path": "rows", "groups": "group", "names": "row", "only_list": "list", "recipes": "recipe"}


def _settings(options: Mapping[str, Any]) -> Settings:
    from benchmarks.quality_table import Settings

    cores = len(os.sched_getaffinity(0))
    return Settings(
        cache=options["cache"],
        reuse=options["reuse"],
        workers=options["workers"] or max(1, cores // options["threads"]),
        threads=options["threads"],
        images=options["images"],
        steps=options["steps"],
        guidance_scale=options["guidance"],
        batch_size=options["batch_size"],
        real_images=options["real_images"],
    )


def _run_table(options: Mapping[str, Any], settings: Settings) -> int:
    from benchmarks.quality_rows import choose_rows, load_rows, resolve_rows
    from benchmarks.quality_table import measure

    from qdexport.cli.progress import Progress

    rows = load_rows(options["rows_path"])
    chosen = choose_rows(rows, options["groups"], options["names"])
    if options["only_list"]:
        _list(chosen, as_json=options["as_json"])
        return 0
    progress = Progress(quiet=options["as_json"])
    everything = {row.name: row for row in resolve_rows(rows)}
    wanted: list[Row] = [everything[entry.name] for entry in chosen]
    table = measure(
        wanted,
        rows.comparisons,
        settings,
        kept_out=list(everything.values()),
        progress=progress,
        console=None if options["as_json"] else progress.console,
    )
    if options["write_docs"]:
        with progress.stage(f"writing {options['docs'] / 'quality.md'}"):
            _write_docs(table, rows.pictures, rows.traces, options["docs"])
    elif options["update_docs"]:
        with progress.stage(f"writing {options['docs'] / 'quality.md'}"):
            _update_docs(table, [row.name for row in rows.rows], options["docs"])
    if options["as_json"]:
        click.echo(json.dumps(_shown(table), indent=2, allow_nan=False))
    else:
        _show(table)
    return _report_failures(table.failed)


def _run_user(options: Mapping[str, Any], settings: Settings) -> int:
    from benchmarks.quality_networks import Networks
    from benchmarks.quality_user import UserJob, measure_user, read_prompts, shown_names

    from qdexport.cli.progress import Progress
    from qdexport.core.recipe import load_recipe

    if options["prompts"] is None or not options["recipes"]:
        raise RecipeError("--model needs --prompts FILE and at least one --recipe")
    sources: Sequence[str] = options["recipes"]
    job = UserJob(
        model=options["model"],
        prompts=read_prompts(options["prompts"], settings.images),
        recipes={name: load_recipe(source) for name, source in zip(shown_names(sources), sources, strict=True)},
        real=options["real"],
        networks=Networks(inception=options["inception"], clip=options["clip"]),
        noise_seed=options["seed"],
    )
    progress = Progress(quiet=options["as_json"])
    console = None if options["as_json"] else progress.console
    figures, _, failed = measure_user(job, settings, progress=progress, console=console)
    if options["as_json"]:
        click.echo(json.dumps({**figures, "failed": failed}, indent=2, allow_nan=False))
    else:
        _show_user(figures)
    return _report_failures(failed)


def _shown(table: Table) -> dict[str, Any]:
    return {**table.figures, "failed": dict(table.failed)}


def _write_docs(table: Table, pictures: Sequence[str], traces: Sequence[str], docs: Path) -> None:
    from benchmarks.quality_docs import quality_markdown
    from benchmarks.quality_plots import plot_errors, plot_pictures, plot_steps

    from qdexport.core.files import write_json, write_text

    rows = table.figures["rows"]
    stores = {name: table.stores[name] for name in pictures if name in table.stores}
    titles = {name: row["title"] for name, row in rows.items()}
    errors, steps, images = (docs / path for path in _CAPTIONS)
    drawn = (plot_errors(rows, errors), plot_steps(rows, traces, steps), plot_pictures(stores, titles, images))
    shown = {path: caption for (path, caption), there in zip(_CAPTIONS.items(), drawn, strict=True) if there}
    write_json(docs / "quality.json", _shown(table))
    write_text(docs / "quality.md", quality_markdown(table.figures, shown))


def _update_docs(table: Table, order: Sequence[str], docs: Path) -> None:
    """Replaces what was measured; the reference rows stay, since they may have been sampled for fewer images."""
    from benchmarks.quality_docs import quality_markdown, updated_figures

    from qdexport.core.files import write_json, write_text

    known = json.loads((docs / "quality.json").read_text(encoding="utf-8"))
    figures = updated_figures(known, table.figures, order)
    shown = {
        path: caption
        for path, caption in _CAPTIONS.items()
        if (docs / path).is_file()
    }
    write_json(docs / "quality.json", {**figures, "failed": known.get("failed", {})})
    write_text(docs / "quality.md", quality_markdown(figures, shown))


def _list(entries: Sequence[RowEntry], *, as_json: bool) -> None:
    from rich.table import Table as Grid

    if as_json:
        click.echo(json.dumps([entry.model_dump() for entry in entries], indent=2))
        return
    grid = Grid("row", "group", "model", "recipe", "images")
    for entry in entries:
        changes = "".join(f"\n  {key}={value}" for key, value in entry.set.items())
        grid.add_row(entry.name, entry.group, entry.model, (entry.recipe or "FP") + changes, str(entry.images))
    _console().print(grid)


def _show(table: Table) -> None:
    from benchmarks.quality_docs import metric_text
    from rich.table import Table as Grid

    metrics = {
        "mse": "image MSE",
        "psnr_db": "PSNR",
        "ssim": "SSIM",
        "frechet_fp": "Frechet FP",
        "frechet_real": "Frechet real",
        "alignment": "alignment",
    }
    grid = Grid("", "W bits", "A bits", *metrics.values())
    for row in table.figures["rows"].values():
        bits = [f"{row[key]:.2f}" if key in row else "" for key in ("weight_bits", "activation_bits")]
        cells = [_cell(row["scores"].get(metric), metric, metric_text) for metric in metrics]
        title = row["title"] if row["model"] == "shapes" else f"{row['model']}: {row['title']}"
        grid.add_row(f"{title} ({row['scores']['alignment']['images']})", *bits, *cells)
    console = _console()
    console.print(grid)
    for pair in table.figures["comparisons"]:
        for metric, difference in pair["differences"].items():
            text = _cell(difference, metric, metric_text).replace("\n", " ")
            verdict = "measurable" if difference["measurable"] else "not measurable"
            ratio = difference["ratio"]
            times = f", ratio {ratio['value']:.2f} {ratio['low']:.2f}..{ratio['high']:.2f}" if ratio else ""
            console.print(f"{pair['row']} - {pair['against']}: {metric} {text}{times}: {verdict}", highlight=False)


def _console() -> Console:
    """On stdout; wide where it is no terminal, so that a table in a file is whole."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def _cell(estimate: Mapping[str, float] | None, metric: str, text: Any) -> str:
    if estimate is None:
        return ""
    value, low, high = (text(metric, estimate[key]) for key in ("value", "low", "high"))
    return f"{value}\n{low}..{high}"


def _show_user(figures: Mapping[str, Any]) -> None:
    from rich.table import Table as Grid

    metrics = list(dict.fromkeys(metric for row in figures["rows"].values() for metric in row["scores"]))
    grid = Grid("", *metrics, title=f"{figures['model']}, {figures['images']} images")
    for name, row in figures["rows"].items():
        grid.add_row(name, *(_user_cell(row["scores"].get(metric)) for metric in metrics))
    console = _console()
    console.print(grid)
    for metric, why in figures["missing"].items():
        console.print(f"{metric}: not measured; {why}", highlight=False, soft_wrap=True, markup=False)


def _user_cell(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    span = f"\n{score['low']:.4g}..{score['high']:.4g}" if "low" in score else ""
    return f"{score['value']:.4g}{span}"


def _report_failures(failed: Mapping[str, str]) -> int:
    for why in failed.values():
        click.echo(f"error: {why}", err=True)
    return _FAILED_EXIT_CODE if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does, so that the processes which sample end too."""
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line; a request to end stops as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    run_command(cli, stopped="stopped; finished images are kept, and the next run goes on from them")


if __name__ == "__main__":
    main()
