"""Exports stored quantized checkpoints of growing size and depth: peak memory against bytes, seconds against layers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from benchmarks.children import run_module
from benchmarks.command import run_command

from qdexport.core.recipe import load_recipe
from qdexport.errors import ParityError

# SD-like UNets by width (bytes grow, layers do not), and by layers per block at one width
_WIDTHS = {f"width {width}": {"block_out_channels": [width, 2 * width, 3 * width]} for width in (64, 128, 192, 256)}
_DEPTHS = {
    f"depth {depth}": {"block_out_channels": [32, 64, 96], "layers_per_block": depth} for depth in (1, 2, 4, 7)
}
_MIB = 1 << 20
_SHARE, _FREE_MB = 1.15, 1e9 / _MIB  # of the checkpoint's bytes, and beside them (the libraries alone take 350 MiB)
_OVERHEAD = 0.02  # of the file: nodes, names and shapes
_OVERHEAD_BYTES = 3_000_000  # a small network is all nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One exported checkpoint; sizes in bytes, memory in MiB, processor time in seconds."""

    model: str
    parameters: int
    layers: int
    checkpoint_bytes: int
    onnx_bytes: int
    packed_bytes: int
    peak_rss_mb: float
    limit_mb: float
    export_cpu_seconds: float

    @property
    def problems(self) -> list[str]:
        """What is above its limit."""
        found = []
        if self.peak_rss_mb > self.limit_mb:
            found.append(f"{self.model}: {self.peak_rss_mb:.0f} MiB, more than {self.limit_mb:.0f}")
        if self.onnx_bytes - self.packed_bytes > max(_OVERHEAD * self.packed_bytes, _OVERHEAD_BYTES):
            found.append(f"{self.model}: a file of {self.onnx_bytes} bytes for {self.packed_bytes} of constants")
        return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "models", multiple=True, help="sd15, sdxl and so on instead of synthetic rows; repeatable.")
@click.option("--recipe", default="w8a8", show_default=True, help="A preset or a .yaml file.")
@click.option("--target", default="tensorrt-rtx", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(models: tuple[str, ...], recipe: str, target: str, as_json: bool) -> None:
    """Makes quantized checkpoints with random weights (FP16) and exports each in a process of its own.

    Fails when the peak of resident memory is above 1.15 times the checkpoint's bytes plus 1 GB, or when a file holds
    more than its constants and its nodes.
    """
    overrides = {"body": "fp16", **({} if models else {"shapes.height": 16, "shapes.width": 16})}
    chosen = load_recipe(recipe, overrides).model_dump(mode="json")
    if models:
        rows = [_measured(name, name, {}, chosen, target) for name in models]
    else:
        cases: dict[str, dict[str, Any]] = {**_WIDTHS, **_DEPTHS}
        rows = [_measured(name, "medium", changes, chosen, target) for name, changes in cases.items()]
    if as_json:
        click.echo(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _show(rows)
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        raise ParityError("\n".join(problems))


def _measured(name: str, model: str, changes: dict[str, Any], recipe: dict[str, Any], target: str) -> _Row:
    with tempfile.TemporaryDirectory(prefix="qdexport-export-") as text:
        folder = Path(text)
        common = {"checkpoint": str(folder / "checkpoint")}
        made = run_module(
            "benchmarks.checkpoint_child",
            {**common, "action": "make", "model": model, "changes": changes, "recipe": recipe},
            folder / "make",
        )
        found = run_module(
            "benchmarks.checkpoint_child",
            {**common, "action": "export", "target": target, "onnx": str(folder / "onnx")},
            folder / "export",
        )
    return _Row(
        model=name,
        parameters=made["parameters"],
        layers=found["layers"],
        checkpoint_bytes=found["checkpoint_bytes"],
        onnx_bytes=found["onnx_bytes"],
        packed_bytes=found["packed_bytes"],
        peak_rss_mb=max(cost["peak_rss_mb"] for cost in found["costs"].values()),
        limit_mb=round(_SHARE * found["checkpoint_bytes"] / _MIB + _FREE_MB, 1),
        export_cpu_seconds=found["costs"]["export"]["cpu_seconds"],
    )


def _show(rows: list[_Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "M params", "layers", "checkpoint MB", "peak MiB", "limit MiB", "ONNX MB", "constants MB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_column("CPU s", justify="right")
    table.add_column("ms per layer", justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.parameters / 1e6:.1f}",
            str(row.layers),
            f"{row.checkpoint_bytes / 1e6:.0f}",
            f"{row.peak_rss_mb:.0f}",
            f"{row.limit_mb:.0f}",
            f"{row.onnx_bytes / 1e6:.1f}",
            f"{row.packed_bytes / 1e6:.1f}",
            f"{row.export_cpu_seconds:.1f}",
            f"{row.export_cpu_seconds / row.layers * 1e3:.0f}",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_command(cli)
