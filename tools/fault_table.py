"""Breaks the real command line in every way that we know, and writes the table of docs/reliability.md.

python tools/fault_table.py                        all rows; fails when one is not green
python tools/fault_table.py --only kill --jobs 4   rows whose group or text has this word, four at a time
python tools/fault_table.py --write                also rewrites the section of docs/reliability.md
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reliability.fault_lab import Lab
    from reliability.fault_rows import Fault

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch: nothing may start threads before a fork

_MODULES = (
    "qdexport.cli.main", "qdexport.pipeline.allocation", "qdexport.pipeline.compilation", "qdexport.pipeline.sampling",
    "qdexport.report.pictures", "torch.onnx._internal.exporter._core", "onnxscript", "onnxruntime", "matplotlib.pyplot",
)  # fmt: skip


def main() -> int:
    """Tries the rows; returns how many are not green."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose group or text has this word")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="keep green rows here and do not try them again"
    )
    parser.add_argument("--few", action="store_true", help="a dozen rows that take seconds")
    parser.add_argument("--write", action="store_true", help="rewrite the section of docs/reliability.md")
    options = parser.parse_args()

    from reliability.fault_lab import Lab
    from reliability.fault_rows import fault_rows, few_rows

    _import_all()
    folder = Path(tempfile.mkdtemp(prefix="qdexport-faults-"))
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    started = time.monotonic()
    try:
        lab = Lab(folder, quick=options.few)
        every = few_rows(lab) if options.few else fault_rows(lab)
        rows = [row for row in every if options.only in f"{row.group} {row.what}"]
        results = _tried(lab, rows, folder, options.jobs, options.known or folder / "known")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    red = [row for row, wrong in results if wrong]
    print(f"{len(results)} rows, {len(red)} not green, {(time.monotonic() - started) / 60:.0f} minutes")
    if options.write:
        _write(results)
    return len(red)


def _tried(lab: Lab, rows: list[Fault], folder: Path, jobs: int, known: Path) -> list[tuple[Fault, list[str]]]:
    """What is wrong with each row; every process takes the next row that none has taken."""
    green = set(known.read_text().splitlines()) if known.is_file() else set()
    todo, done = multiprocessing.get_context("fork").Value("i", 0), folder / "done"
    done.mkdir()

    def work() -> None:
        while True:
            with todo.get_lock():
                number = todo.value
                todo.value += 1
            if number >= len(rows):
                return
            row = f"{rows[number].group}: {rows[number].what}"
            if row in green:
                (done / str(number)).write_text("[]")
                continue
            place = folder / f"row{number}"
            place.mkdir()
            try:
                wrong = rows[number].try_it(lab, place)
            except Exception as error:  # noqa: BLE001 - a row that cannot be tried is not green
                wrong = [f"{type(error).__name__}: {error}"]
            shutil.rmtree(place, ignore_errors=True)
            (done / str(number)).write_text(json.dumps(wrong))
            told = "".join(f"\n      {text}" for text in wrong)
            if not wrong:
                with known.open("a") as stream:
                    stream.write(f"{row}\n")
            print(f"{number + 1}/{len(rows)} {'WRONG' if wrong else 'ok   '} {rows[number].what}{told}", flush=True)

    children = [multiprocessing.get_context("fork").Process(target=work) for _ in range(jobs)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    files = [done / str(number) for number in range(len(rows))]
    found = [json.loads(file.read_text()) if file.is_file() else ["was not tried to its end"] for file in files]
    return list(zip(rows, found, strict=True))


def _import_all() -> None:
    """Everything that a command imports, once for all processes that are forked."""
    for name in _MODULES:
        importlib.import_module(name)
    import diffusers
    import torch

    for name in ("DDIMPipeline", "DDIMScheduler", "UNet2DModel"):
        getattr(diffusers, name)
    torch.set_num_threads(1)


def _write(results: list[tuple[Fault, list[str]]]) -> None:
    from reliability.page import write_section

    groups = collections.Counter(row.group for row, _ in results)
    green = collections.Counter(row.group for row, wrong in results if not wrong)
    lines = [
        "## Faults",
        "",
        "`python tools/fault_table.py --write` forks the command line for each row, breaks it there, and looks at",
        "what is left, how it ended, and what the same command does next. Files of a user lie in OUT meanwhile.",
        f"{sum(green.values())} of {len(results)} rows are green.",
        "",
        "| kind | rows | green |",
        "|---|---|---|",
        *(f"| {group} | {count} | {green[group]} |" for group, count in groups.items()),
        "",
        "| kind | what is done | what must hold | |",
        "|---|---|---|---|",
        *(_line(row, wrong) for row, wrong in results),
    ]
    write_section("faults", "\n".join(lines))


def _line(row: Fault, wrong: list[str]) -> str:
    return f"| {row.group} | {_cell(row.what)} | {_cell(row.holds)} | {_cell('; '.join(wrong)) or 'ok'} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(min(main(), 100))
