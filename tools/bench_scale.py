"""Takes denoisers of real sizes with random weights through the whole compiler, and measures time and memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from benchmarks.command import run_command
from benchmarks.companion_scale import COMPANIONS, CompanionJob, run_companion, show_companions
from benchmarks.scale import MODELS, ScaleJob, run_scale

from qdexport.core.recipe import load_recipe, preset_names
from qdexport.core.target import target_named
from qdexport.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_EXAMPLES = """\b
Examples:
  python tools/bench_scale.py                                     unet50m and sd15, W8A8
  python tools/bench_scale.py --model sd15 --recipe w8a8-timestep --json
  python tools/bench_scale.py --model sdxl --out out/sdxl         keep the files (16 GB of disk)
  python tools/bench_scale.py --model sd15 --set shapes.batch=4
  python tools/bench_scale.py --model sd15-vae --model sd15-text --parity
  python tools/bench_scale.py --model flux-blocks --set shapes.batch=1
  python tools/bench_scale.py --model tiny_sd --recipe all --parity
  python tools/bench_scale.py --model sd15 --recipe mixdq-w4a8 --parity --set shapes.height=16 --set shapes.width=16
"""
# their FP16 plans take more memory to build than all else here
_TOO_LARGE = ("sdxl", "sdxl-turbo", "sd3")


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice([*MODELS, *COMPANIONS]),
    default=("unet50m", "sd15"),
    show_default=True,
    help="Which denoiser, or a VAE decoder or text encoder in floating point; repeatable.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    default=("w8a8",),
    show_default=True,
    help="A preset, a .yaml file, or all for every preset; repeatable.",
)
@click.option("--allow-re-rounding", is_flag=True, help="As --set allow_re_rounding=true.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a value of the recipe.")
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="X.Y",
    default=("8.9",),
    show_default=True,
    help="Compute capability of the engine; repeatable.",
)
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Sampling steps.")
@click.option("--seed", default=0, show_default=True, help="Chooses all that is given.")
@click.option("--parity", is_flag=True, help="Also compare every quantized layer of the ONNX file with PyTorch.")
@click.option(
    "--fp16-baseline/--no-fp16-baseline",
    default=None,
    help="Also build the same denoiser in FP16 and count its kernels.  [default: yes, but not for 2 G parameters]",
)
@click.option("--naive-baseline", is_flag=True, help="Also build the naive portable Q/DQ form, and count its kernels.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Keep graphs, engines and logs here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(  # noqa: PLR0913  one argument per option
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    allow_re_rounding: bool,
    assignments: tuple[str, ...],
    capabilities: tuple[str, ...],
    steps: int,
    seed: int,
    parity: bool,
    fp16_baseline: bool | None,
    naive_baseline: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Quantize denoisers of real sizes (random weights, FP16), export and build them for TensorRT-RTX, and show what
    it takes. Activation ranges, widths of mixed precision, and what else a calibration would find are given.

    Exporter and builder each run in a process of their own; peak memory is that of the larger one. With
    several models or recipes the JSON object holds a list under "models". The tool fails when a layer is not of the
    type that was planned.
    """
    from qdexport.cli.options import overrides_of
    from qdexport.cli.progress import Progress

    names = [name for given in recipes for name in (preset_names() if given == "all" else [given])]
    overrides = overrides_of(assignments, None, allow_re_rounding=allow_re_rounding)
    chosen = [load_recipe(name, overrides) for name in dict.fromkeys(names)]
    progress = Progress(quiet=as_json)
    unets = [model for model in dict.fromkeys(models) if model in MODELS]
    results = []
    with _work_folder(out) as folder:
        beside = [
            run_companion(
                CompanionJob(
                    model=model,
                    shapes=chosen[0].shapes,
                    target=target_named("tensorrt-rtx"),
                    capabilities=capabilities,
                    parity=parity,
                    folder=folder,
                ),
                progress,
            )
            for model in dict.fromkeys(models)
            if model in COMPANIONS
        ]
        for recipe, model in itertools.product(chosen, unets):
            job = ScaleJob(
                model=model,
                recipe=recipe,
                target=target_named("tensorrt-rtx"),
                capabilities=capabilities,
                steps=steps,
                seed=seed,
                parity=parity,
                fp16_baseline=model not in _TOO_LARGE if fp16_baseline is None else fp16_baseline,
                folder=folder,
                naive_baseline=naive_baseline,
            )
            results.append(run_scale(job, progress))
    everything = [*results, *beside]
    if as_json:
        click.echo(json.dumps(everything[0] if len(everything) == 1 else {"models": everything}, indent=2))
    else:
        if beside:
            show_companions(beside)
        for _, group in itertools.groupby(results, key=lambda result: result["recipe"]):
            _show(list(group))
    _refuse_problems(everything)


def _refuse_problems(results: Sequence[dict[str, Any]]) -> None:
    problems = [
        f"{result['model']} {result['recipe']}: {problem}"
        for result in results
        for problem in [*result["mismatches"], *_parity_problems(result["parity"] or {})]
    ]
    if problems:
        raise ParityError("\n".join([f"{len(problems)} problems with what was compiled:", *problems]))


def _parity_problems(parity: dict[str, Any]) -> list[str]:
    found: list[str] = parity.get("problems", parity.get("reasons", []))
    return found


@contextlib.contextmanager
def _work_folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="qdexport-bench-") as folder:
        yield Path(folder)


def _show(results: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0]['recipe']}, compute capability {', '.join(results[0]['compute_capabilities'])}")
    table.add_column()
    for result in results:
        table.add_column(result["model"], justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *map(cell, results), end_section=label in _SECTIONS)
    console = Console()
    console.print(table)
    state = results[0]["machine"]
    console.print(
        f"{state['processor']}, {state['cores']} cores, {state['memory_gb']} GB; load at the start: "
        + ", ".join(f"{result['machine']['load_1_min']:.1f}" for result in results),
        highlight=False,
    )


def _seconds(result: dict[str, Any], *stages: str) -> str:
    return f"{sum(result['stages'][stage]['seconds'] for stage in stages):.1f}"


def _memory(result: dict[str, Any], stage: str) -> str:
    return f"{result['stages'][stage]['peak_rss_mb'] * (1 << 20) / 1e9:.2f}"


def _megabytes(result: dict[str, Any], key: str) -> str:
    return f"{result.get(key, 0) / 1e6:,.0f}"


def _moved(result: dict[str, Any], prefix: str = "") -> str:
    parts = [result.get(f"{prefix}moved_{part}_bytes") for part in ("weight", "activation")]
    return "-" if None in parts else " + ".join(f"{part / 1e6:,.0f}" for part in parts if part is not None)


def _against_fp16(result: dict[str, Any], value: str, fp16: str) -> str:
    return value if result["fp16_kernels"] is None else f"{value} ({fp16})"


def _types(result: dict[str, Any], table: str) -> str:
    return ", ".join(f"{count} {name}" for name, count in result["layers_by_type"][table].items())


def _parity(result: dict[str, Any]) -> str:
    found = result["parity"]
    return f"{found['largest_flip_rate']:.2g}, {found['least_sqnr_db']:.1f} dB" if found else "-"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("parameters, millions", lambda r: f"{r['parameters'] / 1e6:,.1f}"),
    ("quantized layers", lambda r: f"{r['layers_quantized']} of {r['layers']}"),
    ("average weight bits", lambda r: f"{r['average_weight_bits']:.2f}"),
    ("layers planned", lambda r: _types(r, "planned")),
    ("  in the ONNX file", lambda r: _types(r, "onnx")),
    ("  in the engine", lambda r: _types(r, "engine")),
    ("mismatches", lambda r: str(len(r["mismatches"]))),
    ("body; layers' flips, SQNR", lambda r: f"{r['body']}; {_parity(r)}"),
    ("time, s", lambda r: f"{r['seconds']:.1f}"),
    ("  import, make weights", lambda r: _seconds(r, "import", "load")),
    ("  quantize", lambda r: _seconds(r, "quantize")),
    ("  export", lambda r: _seconds(r, "export")),
    ("  build", lambda r: _seconds(r, "build")),
    ("peak memory, GB", lambda r: f"{r['peak_rss_mb'] * (1 << 20) / 1e9:.2f}"),
    ("  quantize", lambda r: _memory(r, "quantize")),
    ("  export", lambda r: _memory(r, "export")),
    ("  build", lambda r: _memory(r, "build")),
    ("ONNX file, MB", lambda r: f"{r['onnx_bytes'] / 1e6:,.0f}"),
    ("ONNX nodes", lambda r: f"{r['nodes']:,}"),
    (
        "engine, MB (FP16)",
        lambda r: _against_fp16(r, _megabytes(r, "engine_bytes"), _megabytes(r, "fp16_engine_bytes")),
    ),
    ("kernels (FP16)", lambda r: _against_fp16(r, str(r["kernels"]), str(r["fp16_kernels"]))),
    (
        "moved weights + activations, MB (FP16)",
        lambda r: _against_fp16(r, _moved(r), _moved(r, "fp16_")),
    ),
    ("  naive Q/DQ form: kernels, moved", lambda r: f"{r.get('naive_kernels', '-')}, {_moved(r, 'naive_')}"),
    ("INT8 + FP convs, gemms", lambda r: f"{r['int8_compute']} + {r['fp_compute']}"),
)
_SECTIONS = ("quantized layers", "body; layers' flips, SQNR", "  build", "ONNX nodes")


def main() -> None:
    """Runs the command line."""
    run_command(cli)


if __name__ == "__main__":
    main()
