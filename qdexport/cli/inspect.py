"""``qdexport inspect``: what is in an ONNX file, a kernel plan, a quantized checkpoint, or an output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdexport.errors import ModelError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["inspect"]

_ROWS = 15
_WIDTH = 44


@click.command(
    epilog="""\b
Examples:
  qdexport inspect out                       the summary of a compilation
  qdexport inspect out/onnx/model.onnx       nodes, types, inputs, bytes
  qdexport inspect out/engine/plan.json      kernels and where they come from
  qdexport inspect out/checkpoint            quantizers, layer by layer
"""
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Show all layers or kernels, not only the largest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(path: Path, layers: bool, as_json: bool) -> None:
    """Show what PATH holds: an output folder, an ONNX file, plan.json, or a quantized checkpoint."""
    from rich.console import Console

    facts = _facts(path)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    _print(facts, Console(highlight=False), None if layers else _ROWS)


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


def _folder_facts(path: Path) -> dict[str, Any]:
    from qdexport.core.results import Manifest, Report

    manifest = Manifest.load(path / "manifest.json")
    report = Report.load(path / "report.json")
    return {
        "kind": "output folder",
        "report": report.model_dump(mode="json", exclude_none=True),
        "folder": str(path),
        "artifacts": [item.model_dump(mode="json") for item in manifest.artifacts],
    }


def _print(facts: dict[str, Any], console: Console, rows: int | None) -> None:
    from rich.table import Table

    if "report" in facts:
        from qdexport.core.results import Report
        from qdexport.report.terminal import summary

        summary(Report.model_validate(facts["report"]), console, Path(facts["folder"]))
        _print_table(console, facts["artifacts"], ["kind", "path", "stage", "sha256"], None)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in facts.items():
        if not isinstance(value, list):
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            table.add_row(f"[dim]{key.replace('_', ' ')}[/]", shown)
    console.print(table)
    for key, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(f"\n[bold]{key}[/] ({len(value)})")
            _print_table(console, value, list(value[0]), rows)


def _print_table(console: Console, items: list[dict[str, Any]], columns: list[str], rows: int | None) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="ellipsis", no_wrap=True)
    for item in items[:rows]:
        table.add_row(*(_cell(item[column]) for column in columns))
    console.print(table)
    if rows is not None and len(items) > rows:
        console.print(f"[dim]... {len(items) - rows} more; --layers shows all[/]")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    # module paths differ at their ends
    return text if len(text) <= _WIDTH else f"\N{HORIZONTAL ELLIPSIS}{text[1 - _WIDTH :]}"
