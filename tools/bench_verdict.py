"""Asks for both verdicts on recipes from 8 bits to 2, over several seeds of validation: do they change?"""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from benchmarks.command import run_command

from qdexport.errors import RecipeError

if TYPE_CHECKING:
    from benchmarks.verdict_rows import VerdictRow

_ROOT = Path(__file__).resolve().parents[1]
_QUALITY_ROWS = Path(__file__).resolve().parent / "benchmarks" / "quality_rows.yaml"
_EXAMPLES = """\b
Examples:
  python tools/bench_verdict.py --seeds 3 --row 'w*'
  python tools/bench_verdict.py --compiled --row w8a8 --target onnxruntime
  python tools/train_shapes.py small classes out/shapes-classes
  python tools/bench_verdict.py --model shapes --model out/shapes-classes --write-docs
"""


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", "models", multiple=True, default=("shapes", "shapes-turbo"), show_default=True,
    help="A bundled name or a diffusers folder; repeatable.",
)
@click.option("--row", "patterns", multiple=True, metavar="GLOB", help="Only recipes with such names; repeatable.")
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(1), help="Seeds of validation.")
@click.option("--compiled", is_flag=True, help="Lower the network and compare it, too; without, pictures alone.")
@click.option("--build", is_flag=True, help="With --compiled: build the engine and read its plan.")
@click.option("--target", default="onnxruntime", show_default=True, help="With --compiled: where it will run.")
@click.option("--workers", type=click.IntRange(1), help="Recipes at once.  [default: cores over --threads]")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of PyTorch in each.")
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), default=Path(".bench-verdict"), show_default=True,
    help="Where pictures and verdicts are kept.",
)
@click.option("--reuse", is_flag=True, help="Take pictures and verdicts that older code of qdexport made.")
@click.option("--again", is_flag=True, help="Judge again; pictures are found again.")
@click.option("--write-docs", is_flag=True, help="Write docs/verdicts.md, docs/verdicts.json and the contact sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(**options: Any) -> int:  # fmt: skip
    """Validate each recipe with each seed, and say which verdicts changed, and how far each was from doing so.

    Pictures and verdicts are kept on disk: interrupted, the next run goes on where this one was. Verdicts on the
    network are made with --compiled, those on pictures without: both are shown together.
    """
    from benchmarks.quality_rows import load_rows
    from benchmarks.verdict_rows import ROWS
    from benchmarks.verdict_runs import Settings, gather, run

    rows = _chosen(ROWS, options["patterns"])
    settings = Settings(
        cache=options["cache"],
        models=tuple(options["models"]),
        rows=rows,
        sources=load_rows(_QUALITY_ROWS).recipes,
        seeds=options["seeds"],
        compiled=options["compiled"],
        build=options["build"],
        target=options["target"],
        workers=options["workers"] or max(1, len(os.sched_getaffinity(0)) // options["threads"]),
        threads=options["threads"],
        reuse=options["reuse"],
        again=options["again"],
    )
    failed = run(settings, say=lambda text: click.echo(text, err=True))
    figures = gather(settings)
    if options["write_docs"]:
        from benchmarks.verdict_docs import write_docs

        write_docs(figures, settings, _ROOT / "docs")
    if options["as_json"]:
        click.echo(json.dumps({**figures, "failed": failed}, indent=2, allow_nan=False))
    else:
        from benchmarks.verdict_docs import table_text

        click.echo(table_text(figures))
    for why in failed.values():
        click.echo(f"error: {why}", err=True)
    return 1 if failed else 0


def _chosen(rows: tuple[VerdictRow, ...], patterns: tuple[str, ...]) -> tuple[VerdictRow, ...]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            raise RecipeError(f"no row is named {pattern!r}; there are {', '.join(row.name for row in rows)}")
    return tuple(row for row in rows if not patterns or any(fnmatch.fnmatchcase(row.name, p) for p in patterns))


def main() -> None:
    """Runs the command line."""
    run_command(cli, stopped="stopped; what is finished is kept, and the next run goes on from it")


if __name__ == "__main__":
    main()
