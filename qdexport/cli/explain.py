"""Says what every compiler pass did to one layer of an output folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

from qdexport.cli.console import make_console

__all__ = ["explanation", "show_explanation"]

_WORDS = {
    "changed": ("changed", "bold"),
    "around": ("changed what is around it", ""),
    "skipped": ("left it", ""),
    "nothing": ("nothing to do", "dim"),
}


def explanation(folder: Path, layer: str) -> list[dict[str, Any]]:
    """One entry per pass: its name, ``changed``, ``around``, ``skipped`` or ``nothing``, and details.

    Raises:
        ModelError: the folder has no log of passes.
        DamagedError: the log is not the one that was written.
        RecipeError: there is no such layer.
    """
    from qdexport.core.integrity import damage_at
    from qdexport.core.pass_log import PASS_LOG_FILE, PassLog
    from qdexport.core.results import Report
    from qdexport.errors import DamagedError

    for damage in damage_at(folder / "onnx" / PASS_LOG_FILE):
        raise DamagedError(f"{folder}: {damage}; run `qdexport export {folder}`")
    report = folder / "report.json"
    coverage = Report.load(report).coverage if report.is_file() and not damage_at(report) else None
    known = sorted({name.partition("#")[0] for name in coverage.planned}) if coverage else None
    found = PassLog.load(folder / "onnx" / PASS_LOG_FILE).explain(layer, known)
    return [{"pass": item.name, "what": item.what, "details": list(item.details)} for item in found]


def show_explanation(folder: Path, layer: str) -> None:
    """Prints it on stderr, so that ``--json`` stays the only thing on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=layer, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for title in ("pass", "what it did", "where, and why"):
        table.add_column(title)
    for item in explanation(folder, layer):
        table.add_row(item["pass"], Text(*_WORDS[item["what"]]), "\n".join(item["details"]))
    make_console(stderr=True).print(table)
