"""Side by side with NVIDIA ModelOpt: one UNet, quantized to INT8, exported and built by both in one run.

ModelOpt lives in an environment of its own, .venv-peers, made on the first run (1.6 GB).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from benchmarks.children import ChildError, run_module
from benchmarks.command import run_command
from benchmarks.costs import machine
from benchmarks.peers import ROUTES, finished, rows_of

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
  python tools/bench_peers.py
  python tools/bench_peers.py --out out/peers --markdown > table.md
  python tools/bench_peers.py --threads 2 --json
"""


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--capability", default="8.9", show_default=True, help="Compute capability of the engines.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of PyTorch.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs, engines and logs.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(capability: str, threads: int, out: Path | None, markdown: bool, as_json: bool) -> None:
    """Compare qdexport with ModelOpt 0.47: time, memory, file size, nodes, ONNX Runtime, TensorRT-RTX, kernels
    and INT8 layers.

    Both quantize the same 50.3 million parameter UNet (FP32, seed 0) after the same three calibration calls.
    Each column is a process of its own.
    """
    from qdexport.cli.progress import Progress

    progress = Progress(quiet=as_json)
    columns = []
    with _work_folder(out) as folder:
        python = _modelopt_python(progress)
        state = machine()
        for route in ROUTES:
            where = folder / route.name.replace(" ", "-")
            with progress.stage(f"{route.name}: quantize and export"):
                spec = {**route.spec, "threads": threads, "folder": str(where / "onnx")}
                answered = run_module(route.module, spec, where, python if route.foreign else None)
            with progress.stage(f"{route.name}: load and build"):
                columns.append(finished(route, answered, where, capability))
    if as_json:
        click.echo(json.dumps({"machine": state, "threads": threads, "columns": columns}, indent=2))
    elif markdown:
        click.echo(_markdown(columns))
    else:
        _show(columns, state)


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
    return "\n".join(lines)


def _show(columns: Sequence[dict[str, Any]], state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="50.3 M UNet, INT8")
    table.add_column()
    for column in columns:
        table.add_column(column["name"], justify="right", overflow="fold")
    for label, cells in rows_of(columns):
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    facts = f"{state['processor']}, {state['cores']} cores; load at the start: {state['load_1_min']:.1f}"
    console.print(facts, highlight=False)
    for column in columns:
        if column["rtx"] is not None or column["ort"] is not None:
            console.print(f"{column['name']}: {column['ort'] or column['rtx']}", highlight=False, markup=False)


def main() -> None:
    """Runs the command line."""
    run_command(cli)


if __name__ == "__main__":
    main()
