"""Side by side with NVIDIA ModelOpt: one UNet, quantized to one format, exported and built by both in one run.

ModelOpt lives in an environment of its own, .venv-peers, made on the first run (1.6 GB).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from benchmarks.children import ChildError, run_module
from benchmarks.command import run_command
from benchmarks.costs import machine
from benchmarks.peers import FORMATS, MODELS, Route, failed, finished, routes, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qdexport.core.progress import ProgressSink

_ROOT = Path(__file__).resolve().parents[1]
_VENV = _ROOT / ".venv-peers"
# the same torch and diffusers as qdexport's, so that both start from the same weights
_SHARED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
# ModelOpt's extra [onnx] without its GPU packages (onnxruntime-gpu, cupy), which exporting on a CPU does not need
_PACKAGES = (
    "nvidia-modelopt==0.47.0",
    "onnx~=1.21.0",
    "onnx-graphsurgeon>=0.6.1",
    "onnxconverter-common~=1.16.0",
    "onnxslim>=0.1.76",
    "onnxscript",
    "onnxruntime~=1.24.2",
    "polygraphy>=0.53.4",
    "cppimport",
    "lief",
    "ml_dtypes",
)
_EXAMPLES = """\b
Examples:
  python tools/bench_peers.py                                    INT8 on 50 M parameters
  python tools/bench_peers.py --format fp8 --format w4a8 --format int4
  python tools/bench_peers.py --model sdxl --format int8         24 GB of memory, 40 GB of disk, an hour
  python tools/bench_peers.py --out out/peers --markdown > table.md
  python tools/bench_peers.py --threads 2 --json
"""


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(MODELS), default="unet50m", show_default=True, help="What to quantize.")
@click.option("--format", "forms", type=click.Choice(FORMATS), multiple=True, default=("int8",), show_default=True,
              help="To what; a table for each.")
@click.option("--capability", default="8.9", show_default=True, help="Compute capability of the engines.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of PyTorch.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs, engines and logs.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(  # noqa: PLR0913  one argument per option
    model: str, forms: tuple[str, ...], capability: str, threads: int, out: Path | None, markdown: bool, as_json: bool
) -> None:
    """Compare qdexport with ModelOpt 0.47: time, memory, file size, nodes, ONNX Runtime, TensorRT-RTX, kernels
    and narrow layers.

    Both quantize the same UNet (FP32, seed 0) after the same three calibration calls: one of 50.3 million parameters,
    or SDXL's of 2.6 billion. Each column is a process of its own; one that fails says what it last said.
    """
    from qdexport.cli.progress import Progress

    progress = Progress(quiet=as_json)
    tables = {}
    with _work_folder(out) as folder:
        python = _modelopt_python(progress)
        state = machine()
        for form in forms:
            how = _Run(folder / f"{model}-{form}", python, capability, threads)
            tables[form] = [_column(route, how, progress) for route in routes(model, form)]
    if as_json:
        columns = [column for table in tables.values() for column in table]
        click.echo(json.dumps({"machine": state, "threads": threads, "columns": columns}, indent=2))
        return
    for form, columns in tables.items():
        if markdown:
            click.echo(_markdown(columns))
        else:
            _show(f"{model}, {form}", columns, state)


@dataclass(frozen=True, slots=True)
class _Run:
    """Where and how the columns of a table are made."""

    folder: Path
    python: Path
    capability: str
    threads: int


def _column(route: Route, how: _Run, progress: ProgressSink) -> dict[str, Any]:
    where = how.folder / route.name.replace(" ", "-")
    spec = {**route.spec, "threads": how.threads, "folder": str(where / "onnx")}
    try:
        with progress.stage(f"{route.name}: quantize and export"):
            answered = run_module(route.module, spec, where, how.python if route.foreign else None)
    except ChildError as error:
        if not route.foreign:
            raise
        return failed(route, error)  # that of a peer is a result
    with progress.stage(f"{route.name}: load and build"):
        return finished(route, answered, where, how.capability)


@contextlib.contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="qdexport-peers-") as folder:
        yield Path(folder)


def _modelopt_python(progress: ProgressSink) -> Path:
    """The interpreter of ModelOpt's environment, which is made when absent, outdated or half made."""
    python, stamp = _VENV / "bin" / "python", _VENV / "qdexport-ready"
    wanted = "\n".join([*_shared_versions(), *_PACKAGES])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    with progress.stage("install ModelOpt into .venv-peers (some minutes)"):
        shutil.rmtree(_VENV, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(_VENV)])
        _run([str(python), "-m", "pip", "install", "-q", "--no-input", *wanted.split("\n")])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _shared_versions() -> list[str]:
    pins = (_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [pin for pin in pins if pin.partition("==")[0] in _SHARED]


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ChildError(f"{' '.join(command[:4])} ... failed:\n{result.stderr.strip()[-2000:]}")


def _markdown(columns: Sequence[dict[str, Any]]) -> str:
    rows = rows_of(columns)
    lines = ["| | " + " | ".join(column["name"] for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += ["| " + " | ".join([label, *cells]) + " |" for label, cells in rows]
    lines += ["", *(f"- {name}: {reason}" for name, reason in _reasons(columns))]
    return "\n".join(lines)


def _show(title: str, columns: Sequence[dict[str, Any]], state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column()
    for column in columns:
        table.add_column(column["name"], justify="right", overflow="fold")
    for label, cells in rows_of(columns):
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    facts = f"{state['processor']}, {state['cores']} cores; load at the start: {state['load_1_min']:.1f}"
    console.print(facts, highlight=False)
    for name, reason in _reasons(columns):
        console.print(f"{name}: {reason}", highlight=False, markup=False)


def _reasons(columns: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a column could not do, in the words of what refused it."""
    keys = ("failed", "ort", "rtx")
    return [(column["name"], column[key]) for column in columns for key in keys if column.get(key)]


def main() -> None:
    """Runs the command line."""
    run_command(cli)


if __name__ == "__main__":
    main()
