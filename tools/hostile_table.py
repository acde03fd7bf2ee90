"""Runs qdexport on inputs that are broken or hostile, and judges how each command ends."""

from __future__ import annotations

import collections
import fnmatch
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from reliability.hostile_artefacts import artefact_rows
from reliability.hostile_files import file_rows
from reliability.hostile_models import model_rows
from reliability.hostile_recipes import recipe_rows
from reliability.hostile_run import make_seeds, run_row
from reliability.page import write_section

from qdexport.core.shown import one_line

if TYPE_CHECKING:
    from reliability.hostile_run import Outcome, Row

_SECTION = "hostile inputs"
_LONGEST = 150
_MODULES = (
    "onnxruntime",
    "onnxscript",
    "qdexport.build.inspect",
    "qdexport.cli.main",
    "qdexport.passes",
    "qdexport.pipeline.allocation",
    "qdexport.pipeline.compilation",
    "qdexport.pipeline.sampling",
    "qdexport.quant.inspect",
    "qdexport.report.terminal",
    "torch.export",
)
_CLASSES = (
    "diffusers.AutoencoderKL",
    "diffusers.DDIMPipeline",
    "diffusers.DDIMScheduler",
    "diffusers.StableDiffusionPipeline",
    "diffusers.UNet2DConditionModel",
    "diffusers.UNet2DModel",
    "transformers.CLIPTextModel",
    "transformers.CLIPTokenizer",
)
_EXAMPLES = """\b
Examples:
  python tools/hostile_table.py                              all rows
  python tools/hostile_table.py --only '*safetensors*'       those whose group or name matches
  python tools/hostile_table.py --every 20                   each twentieth
  python tools/hostile_table.py --write-docs                 all rows, into docs/reliability.md
"""


def all_rows() -> list[Row]:
    """Every hostile input, in a fixed order."""
    return [*recipe_rows(), *model_rows(), *artefact_rows(), *file_rows()]


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="PATTERN", help="Rows whose group or description matches.")
@click.option("--every", type=click.IntRange(1), default=1, help="Takes each n-th row.")
@click.option(
    "--seeds",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the valid inputs; kept, and used again.",
)
@click.option("--write-docs", is_flag=True, help="Rewrite the section in docs/reliability.md.")
@click.option("--json", "as_json", is_flag=True, help="Print every outcome as JSON.")
def main(only: str | None, every: int, seeds: Path | None, write_docs: bool, as_json: bool) -> None:
    """Run hostile inputs through every verb, each in a forked process. Ends with 1 when a row is not green.

    A row is green when the command ends in time with a documented code of the right kind and one message, shows no
    traceback and no control character, prints little, and writes nothing outside its output folder.
    """
    rows = [row for row in all_rows() if only is None or fnmatch.fnmatch(f"{row.group}: {row.what}", f"*{only}*")]
    outcomes = run_rows(rows[::every], seeds)
    if as_json:
        click.echo(json.dumps([_facts(item) for item in outcomes], indent=1))
    if write_docs:
        write_section(_SECTION, _page(outcomes, every))
    sys.exit(any(item.wrong for item in outcomes))


def run_rows(rows: list[Row], kept: Path | None = None) -> list[Outcome]:
    """Runs rows one after the other, and tells of those that are not green and how much time is left."""
    import torch

    torch.set_num_threads(1)  # nothing may start threads before a fork
    _import_everything()
    outcomes, started = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-seeds-") as name:
        seeds = make_seeds(kept or Path(name))
        for number, row in enumerate(rows, 1):
            outcome = run_row(row, seeds)
            outcomes.append(outcome)
            for wrong in outcome.wrong:
                _tell(f"{row.group}: {row.what}: {wrong} [exit {outcome.code}, {outcome.message}]")
            if number % 50 == 0:
                left = (time.monotonic() - started) / number * (len(rows) - number)
                _tell(f"{number} of {len(rows)} rows, about {left:.0f} s left")
    red = sum(bool(item.wrong) for item in outcomes)
    _tell(f"{len(outcomes)} rows, {red} not green, {time.monotonic() - started:.0f} s")
    return outcomes


def _import_everything() -> None:
    """What every command imports, once for all forks."""
    from qdexport.models.library_logs import quiet_libraries

    for name in _MODULES:
        importlib.import_module(name)
    with quiet_libraries():
        for name in _CLASSES:
            module, _, attribute = name.partition(".")
            getattr(importlib.import_module(module), attribute)


def _tell(text: str) -> None:
    click.echo(one_line(text)[:600], err=True)


def _facts(item: Outcome) -> dict[str, object]:
    return {"group": item.row.group, "what": item.row.what, "code": item.code, "seconds": round(item.seconds, 2),
            "message": item.message, "wrong": item.wrong}  # fmt: skip


def _page(outcomes: list[Outcome], every: int = 1) -> str:
    groups = collections.Counter(item.row.group for item in outcomes)
    green = sum(not item.wrong for item in outcomes)
    lines = [
        "## Hostile inputs",
        "",
        f"`python tools/hostile_table.py --every {every} --write-docs` ran {len(outcomes)} inputs through the",
        "commands that read them,",
        f"each in a process of its own; {green} ended as they must: in time, with a documented exit code of the right",
        "kind and one message, without a traceback or a control character on the terminal, and with nothing written",
        f"outside the output folder. The slowest took {max(item.seconds for item in outcomes):.0f} s.",
    ]
    for group in groups:
        lines += ["", f"### {group} ({groups[group]})", "", "| input | exit | message |", "|---|---|---|"]
        for item in outcomes:
            if item.row.group == group:
                mark = "" if not item.wrong else f"**{'; '.join(item.wrong)}** "
                lines.append(f"| {_cell(item.row.what)} | {item.code} | {mark}{_cell(item.message)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = one_line(text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


if __name__ == "__main__":
    main()
