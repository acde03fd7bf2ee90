"""Compiles random denoisers with random recipes for every target, and fails on the first broken promise of each."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from benchmarks.command import run_command
from benchmarks.fuzz import Draw, FuzzError, check_draw, draw
from benchmarks.fuzz_draws import TRANSFORMERS, UNETS

_EXAMPLES = """\b
Examples:
  python tools/fuzz_compile.py                          300 draws, from seed 0 (hours on two cores)
  python tools/fuzz_compile.py --draws 10 --first 40    seeds 40 to 49
  python tools/fuzz_compile.py --first 47 --draws 1 --keep case-47
  python tools/fuzz_compile.py --draws 40 --models transformers
"""
_FAILED = 8
_MODELS = {"all": (*UNETS, *TRANSFORMERS), "unets": UNETS, "transformers": TRANSFORMERS}


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--draws", default=300, show_default=True, type=click.IntRange(1), help="How many cases.")
@click.option("--first", default=0, show_default=True, help="Seed of the first; the others follow.")
@click.option("--models", type=click.Choice(list(_MODELS)), default="all", show_default=True, help="What to draw from.")
@click.option("--small", is_flag=True, help="Two levels or blocks, one layer each.")
@click.option("--build/--no-build", default=True, show_default=True, help="Also build with TensorRT-RTX.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs and engines here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(  # noqa: PLR0913  one argument per option
    draws: int, first: int, models: str, small: bool, build: bool, keep: Path | None, as_json: bool
) -> None:
    """Draw random UNets and transformers (depth, widths, attention, activations, conditions) and recipes
    (widths, symmetry, rows, every mechanism), lower each for all targets, execute the graph before and after each pass,
    compare every layer of the file with PyTorch, build, and audit the plan. Nothing is skipped:
    what cannot be compiled counts as a failure.
    """
    failures: list[dict[str, Any]] = []
    passed = []
    for seed in range(first, first + draws):
        case = draw(seed, small=small, models=_MODELS[models])
        started = time.perf_counter()
        try:
            seen = asdict(_check(case, keep, build=build))
        except FuzzError as error:
            failures.append({"seed": seed, "case": asdict(case), "error": str(error)})
            click.echo(f"FAILED {case}\n  {error}", err=True)
            continue
        passed.append({"seed": seed, **seen})
        click.echo(f"ok {seed}: {seen['layers']} layers, {seen['least_db']:.1f} dB, {seen['kernels']} kernels, "
                   f"{time.perf_counter() - started:.0f} s", err=True)  # fmt: skip
    click.echo(f"{len(passed)} of {draws} draws hold" if not as_json else json.dumps(
        {"draws": draws, "first": first, "passed": passed, "failures": failures}))  # fmt: skip
    if failures:
        sys.exit(_FAILED)


def _check(case: Draw, keep: Path | None, *, build: bool) -> Any:
    if keep is not None:
        return check_draw(case, keep / str(case.seed), build=build)
    with tempfile.TemporaryDirectory(prefix="qdexport-fuzz-") as folder:
        return check_draw(case, Path(folder), build=build)


if __name__ == "__main__":
    run_command(cli)
