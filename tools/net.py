"""Everything that the compiler makes, as text, before a change and after it: what is not meant to change did not."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click
from benchmarks.net_rows import DOZEN, ROWS, Row, drawn

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "tests" / "net.json"
_EXAMPLES = """\b
Examples:
  python tools/net.py record out/before                    all rows
  python tools/net.py record out/before --code ../old      all rows of another checkout
  python tools/net.py record out/after --draw 7            a tenth of them, those of seed 7
  python tools/net.py record out/after --row 'dit-*'       by name
  python tools/net.py compare out/before out/after         rows that both have
  python tools/net.py check                                a dozen against what is committed (structure alone)
  python tools/net.py check --write                        commits to what they give now
"""
_SHARE = 0.1
_SHOWN = 12
# a child's memory grows with what it imports and caches
_ROWS_PER_CHILD = 25


@click.group(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Record what every preset makes of every small model for every target, and compare two records.

    A row is a folder of two texts: `structure.txt` (exit code, message, graph, passes, kernels, coverage) is the same
    on every processor, `numbers.txt` (digests of weights and scales, the report) on one machine alone.
    """


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--row", "patterns", multiple=True, metavar="GLOB", help="Only rows with such names; repeatable.")
@click.option("--draw", type=int, metavar="SEED", help="Only a tenth of the rows, another for every seed.")
@click.option("--code", type=click.Path(exists=True, file_okay=False, path_type=Path), default=ROOT,
              help="Whose package to run.  [default: this checkout]")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), show_default="cores")
def record(folder: Path, patterns: tuple[str, ...], draw: int | None, code: Path, workers: int) -> None:
    """Run rows, and keep what came of them in FOLDER; rows that are there already are not run again."""
    rows = [row for row in (ROWS if draw is None else drawn(draw, _SHARE)) if _chosen(row, patterns)]
    _record(rows, folder, code, workers)


@cli.command()
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--structure", is_flag=True, help="Leave the numbers out: the records are of two machines.")
def compare(before: Path, after: Path, structure: bool) -> None:
    """Print the differences between two records; end with 1 when there is one, or when they share no row."""
    names = sorted({path.name for path in before.iterdir()} & {path.name for path in after.iterdir()} - {"models"})
    changed = [name for name in names if _differ(before / name, after / name, structure=structure)]
    click.echo(f"{len(names)} rows in both, {len(changed)} differ")
    sys.exit(int(bool(changed) or not names))


@cli.command()
@click.option("--write", is_flag=True, help="Keep what the rows give now as what they should give.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / ".net", show_default=False,
              help="For the record.  [default: .net]")  # fmt: skip
def check(write: bool, folder: Path) -> None:
    """Run a dozen rows anew, and compare their structure with what is committed."""
    shutil.rmtree(folder, ignore_errors=True)
    rows = [row for row in ROWS if row.name in DOZEN]
    _record(rows, folder, ROOT, os.cpu_count() or 1)
    found = {row.name: digest(folder / row.name / "structure.txt") for row in rows}
    if write:
        COMMITTED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    kept = json.loads(COMMITTED.read_text(encoding="utf-8"))
    changed = [name for name in sorted({*found, *kept}) if found.get(name) != kept.get(name)]
    for name in changed:
        click.echo(f"{name}: {_changes(kept.get(name, {}), found.get(name, {}))}")
    click.echo(f"{len(rows)} rows, {len(changed)} differ" + (": `record` before and after says how" if changed else ""))
    sys.exit(int(bool(changed)))


def digest(path: Path) -> dict[str, str]:
    """A row's structure in short: of each section how many lines it has, and a digest."""
    sections: dict[str, list[str]] = {}
    lines = sections.setdefault("said", [])
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = sections.setdefault(line[3:], [])
        else:
            lines.append(line)
    return {
        name: f"{len(lines)} lines, {hashlib.sha256(os.linesep.join(lines).encode()).hexdigest()[:16]}"
        for name, lines in sections.items()
    }


def _changes(old: dict[str, str], new: dict[str, str]) -> str:
    told = [f"{name}: {old.get(name, 'nothing')} -> {new.get(name, 'nothing')}" for name in {**old, **new}
            if old.get(name) != new.get(name)]  # fmt: skip
    return "; ".join(told)


def _record(rows: list[Row], folder: Path, code: Path, workers: int) -> None:
    if not rows:
        raise click.UsageError("no row has such a name")
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    waiting = [row for row in rows if not (folder / row.name / "numbers.txt").is_file()]
    click.echo(f"{len(rows)} rows, {len(rows) - len(waiting)} of them known", err=True)
    started, seconds = time.monotonic(), 0.0
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _prepare, (str(code.resolve()),), max_tasks_per_child=_ROWS_PER_CHILD
    ) as pool:
        futures = {pool.submit(_run, row, models.resolve(), (folder / row.name).resolve()): row for row in waiting}
        for number, future in enumerate(as_completed(futures), 1):
            ended = future.result()
            seconds = time.monotonic() - started
            left = seconds / number * (len(waiting) - number) / 60
            told = f"{number} of {len(waiting)}, about {left:.0f} min left"
            click.echo(f"{futures[future].name}: code {ended}; {told}", err=True)


def _prepare(code: str) -> None:
    """Of a child: one thread, no network, and the package of a checkout before any that is installed."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NO_COLOR="1", COLUMNS="100")
    sys.path.insert(0, code)
    os.environ["PYTHONPATH"] = code


def _run(row: Row, models: Path, folder: Path) -> int:
    from benchmarks.net_child import run_row

    return run_row(row, models, folder)


def _chosen(row: Row, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)


def _differ(before: Path, after: Path, *, structure: bool) -> bool:
    """Prints the first differences between two rows; whether there are any."""
    lines = [line for name in _texts(structure) for line in _difference(before / name, after / name)]
    for line in lines[:_SHOWN]:
        click.echo(line)
    if len(lines) > _SHOWN:
        click.echo(f"... and {len(lines) - _SHOWN} lines more")
    return bool(lines)


def _texts(structure: bool) -> tuple[str, ...]:
    return ("structure.txt",) if structure else ("structure.txt", "numbers.txt")


def _difference(before: Path, after: Path) -> Iterator[str]:
    old, new = (path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in (before, after))
    yield from difflib.unified_diff(old, new, str(before), str(after), n=0, lineterm="")


if __name__ == "__main__":
    cli()
