"""``qdexport inspect``: what is in an ONNX file, a kernel plan, a quantized checkpoint, or an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdexport.cli.console import make_console, print_json
from qdexport.cli.explain import explanation, show_explanation
from qdexport.core.gpus import GPUS, gpu_named
from qdexport.core.owned import refuse_overwriting
from qdexport.core.reading import reading
from qdexport.core.shown import one_line
from qdexport.errors import DamagedError, ModelError, QdExportError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["inspect"]

_ROWS = 15
_CHART_MARK = b"Software\0qdexport"
_PNG_HEAD = 4096  # bytes; a PNG file begins with what it says about itself
_WIDTH = 44
_COST_COLUMNS = ["microseconds", "should", "bound", "role", "type", "kilobytes", "modules"]


@click.command(
    epilog="""\b
Examples:
  qdexport inspect out                       the summary of a compilation
  qdexport inspect out/onnx/model.onnx       nodes, types, inputs, bytes
  qdexport inspect out/engine/plan.json      kernels and where they come from
  qdexport inspect out --gpu rtx-4090 --plot cost.png    what each kernel must cost on a card
  qdexport inspect out/checkpoint            quantizers, layer by layer
  qdexport inspect out --explain mid_block.resnets.0.conv1    what every compiler pass did to a layer
"""
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Show all layers or kernels, not only the largest.")
@click.option(
    "--gpu",
    metavar="NAME",
    help=f"Predict what each kernel of the plan must cost at least: {', '.join(GPUS)}.",
)
@click.option("--explain", metavar="LAYER", help="Of an output folder: what every compiler pass did to a layer.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="With --gpu: also draw it (PNG).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(  # one argument per option
    path: Path, layers: bool, gpu: str | None, explain: str | None, plot: Path | None, as_json: bool
) -> None:
    """Show what PATH holds: an output folder, an ONNX file, plan.json, or a quantized checkpoint.

    With --gpu, a plan's kernels with the bytes they move, the operations they do, and the time that the card's peak
    rates leave them (a bound, not a measurement), and what to change.
    """
    if explain is not None:
        _explain(path, explain, as_json=as_json)
        return
    if plot is not None and gpu is None:
        raise click.UsageError("--plot draws predicted costs: say for which card with --gpu")
    if plot is not None:
        refuse_overwriting(plot, _is_chart)
    from qdexport.core.integrity import damage_at

    with reading(path, ModelError):
        damage = damage_at(path)
        try:
            facts = _facts(path) if gpu is None else _cost_facts(path, gpu, plot)
        except QdExportError as error:
            if damage:
                raise _damaged(path, damage) from error
            raise
    if as_json:
        print_json({**facts, "damaged": damage} if damage else facts)
    else:
        with reading(path, ModelError, what="cannot be shown"):
            _print(facts, make_console(), None if layers else _ROWS)
        for text in damage[1:]:
            click.echo(f"damaged: {one_line(text)}")
    if damage:
        raise _damaged(path, damage)


def _damaged(path: Path, damage: list[str]) -> DamagedError:
    return DamagedError(f"{path}: {damage[0]}; run the `qdexport` command that made it again")


def _explain(path: Path, layer: str, *, as_json: bool) -> None:
    if as_json:
        print_json(explanation(path, layer))
    else:
        show_explanation(path, layer)


def _facts(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    if path.suffix == ".onnx":
        from qdexport.emit.inspect import onnx_facts

        return onnx_facts(path)
    if path.name.endswith(".json") or (path / "plan.json").is_file():
        from qdexport.build.inspect import plan_facts
        from qdexport.core.results import Plan

        return plan_facts(Plan.load(path if path.is_file() else path / "plan.json"))
    if (path / "quantization.safetensors").is_file():
        from qdexport.quant.inspect import checkpoint_facts

        return checkpoint_facts(path)
    if (path / "manifest.json").is_file():
        return _folder_facts(path)
    raise ModelError(
        f"{path} is none of: an output folder (manifest.json), an .onnx file, plan.json, a checkpoint "
        "(quantization.safetensors)"
    )


def _cost_facts(path: Path, gpu: str, plot: Path | None) -> dict[str, Any]:
    from qdexport.build.inspect import cost_facts
    from qdexport.build.plan_cost import plan_cost
    from qdexport.core.results import Plan
    from qdexport.report.plan_chart import save_plan_chart

    card = gpu_named(gpu)
    candidates = [path] if path.is_file() else [path / "plan.json", path / "engine" / "plan.json"]
    file = next((item for item in candidates if item.is_file()), None)
    if file is None:
        raise ModelError(f"{path} has no kernel plan; --gpu needs plan.json or an output folder with an engine")
    cost = plan_cost(Plan.load(file), card)
    if plot is not None:
        save_plan_chart(plot.resolve(), cost)
    return cost_facts(cost)


def _is_chart(path: Path) -> bool:
    with path.open("rb") as stream:
        return _CHART_MARK in stream.read(_PNG_HEAD)


def _folder_facts(path: Path) -> dict[str, Any]:
    from qdexport.core.integrity import damage_at
    from qdexport.core.results import Manifest, Report

    manifest = Manifest.load(path / "manifest.json")
    try:
        report = Report.load(path / "report.json").model_dump(mode="json", exclude_none=True)
    except QdExportError as error:
        if not damage_at(path / "report.json"):
            raise
        report = {"unreadable": str(error)}
    return {
        "kind": "output folder",
        "report": report,
        "folder": str(path),
        "artifacts": [item.model_dump(mode="json") for item in manifest.artifacts],
    }


def _print(facts: dict[str, Any], console: Console, rows: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    if "report" in facts:
        from qdexport.core.results import Report
        from qdexport.report.terminal import summary

        if "unreadable" not in facts["report"]:
            summary(Report.model_validate(facts["report"]), console, Path(facts["folder"]))
        _print_table(console, facts["artifacts"], ["kind", "path", "stage", "sha256"], None)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in facts.items():
        if not isinstance(value, list):
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else _cell(value, None)
            table.add_row(Text(key.replace("_", " "), style="dim"), shown)
    console.print(table)
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(Text.assemble("\n", (key, "bold"), f" ({len(value)})"))
            _print_table(console, value, _COST_COLUMNS if "microseconds" in value[0] else list(value[0]), rows)
        elif isinstance(value, list) and value:
            console.print(Text.assemble("\n", (key, "bold")))
            for item in value:
                console.print(f"- {item}")


def _print_table(console: Console, items: list[dict[str, Any]], columns: list[str], rows: int | None) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="ellipsis", no_wrap=True)
    for item in items[:rows]:
        table.add_row(*(_cell(item[column]) for column in columns))
    console.print(table)
    if rows is not None and len(items) > rows:
        console.print(f"... {len(items) - rows} more; --layers shows all", style="dim")


def _cell(value: Any, width: int | None = _WIDTH) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = one_line(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    # module paths differ at their ends
    return text if width is None or len(text) <= width else f"\N{HORIZONTAL ELLIPSIS}{text[1 - width :]}"
