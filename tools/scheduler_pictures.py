"""The pictures of one folder with several schedulers: its ONNX files', and those of the quantized model's roundings.

    python tools/scheduler_pictures.py OUT                           # the table of docs/schedulers.md; 20 minutes
    python tools/scheduler_pictures.py OUT --each --steps 4 UniPC    # one scheduler, image by image

Every number is the mean squared error of a picture on [-1, 1]: the median of the pictures, and the largest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click
import numpy as np
import torch

from qdexport.check.noise_floor import rounding
from qdexport.errors import QdExportError
from qdexport.models.denoiser import call_denoiser
from qdexport.models.sampling import NamedDenoiser, SampleRequest, prompts_for
from qdexport.pipeline.sampling import open_denoisers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qdexport.pipeline.sampling import Denoisers

SCHEDULERS = ("DDIM", "DPMSolverMultistep", "Euler", "UniPC", "Euler,timestep_spacing=linspace")
STEPS = (4, 25, 50)
COLUMNS = ("quantization", "rounding alone", "denoiser's file", "all files", "another seed")


def rounded(generator: torch.Generator, denoiser: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A prediction in which every operator rounds its result up or down at random."""
    with rounding(generator):
        return call_denoiser(denoiser, inputs)


def errors(denoisers: Denoisers, request: SampleRequest, draws: int) -> dict[str, np.ndarray]:
    """Of every column, the error of each picture."""
    quantized = denoisers.by_kind["quantized"]
    alone = replace(denoisers, companions={})
    floating, own = (denoisers.sample(kind, request) for kind in ("fp", "quantized"))

    def drawn(seed: int) -> np.ndarray:
        source = torch.Generator().manual_seed(seed)
        noisy = NamedDenoiser(partial(rounded, source, quantized), denoisers.loaded.denoiser)
        return replace(alone, by_kind={"noisy": noisy}).sample("noisy", request)

    pairs = {
        "quantization": [(floating, own)],
        "rounding alone": [(own, drawn(seed)) for seed in range(draws)],
        "denoiser's file": [(own, alone.sample("onnx", request))],
        "all files": [(own, denoisers.sample("onnx", request))],
        "another seed": [(floating, denoisers.sample("fp", replace(request, noise_seed=request.seed + 1000)))],
    }
    return {
        name: np.stack([((one - other) ** 2).mean(axis=(1, 2, 3), dtype=np.float64) for one, other in several])
        for name, several in pairs.items()
    }


def number(value: float) -> str:
    """`4.3e-5`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def row(out: str, scheduler: str, request: SampleRequest, draws: int, each: bool) -> None:
    """Prints a line of the table; with `each`, every picture of every column before it."""
    denoisers = open_denoisers(out, ("fp", "quantized", "onnx"), scheduler)
    request = replace(request, prompts=tuple(prompts_for(denoisers.loaded, len(request.prompts), request.seed)))
    try:
        denoisers.check(request)
    except QdExportError as error:
        print(f"| {scheduler} | {request.steps} | refused: {error} |", flush=True)
        return
    found = errors(denoisers, request, draws)
    for name, values in found.items() if each else ():
        for line in values:
            print(f"{name:16}", *(f"{number(value):>8}" for value in line), flush=True)
    cells = [f"{number(float(np.median(found[name])))} ({number(found[name].max())})" for name in COLUMNS]
    print(f"| {scheduler} | {request.steps} | {' | '.join(cells)} |", flush=True)


@click.command()
@click.argument("out")
@click.argument("schedulers", nargs=-1)
@click.option("--steps", type=int, multiple=True, help="Repeatable; default: 4, 25 and 50.")
@click.option("--count", default=8, show_default=True, help="Pictures.")
@click.option("--draws", default=2, show_default=True, help="How often the roundings are drawn.")
@click.option("--each", is_flag=True, help="Print every picture's error.")
def main(out: str, schedulers: tuple[str, ...], steps: tuple[int, ...], count: int, draws: int, each: bool) -> None:
    """Compares the pictures of OUT, a folder of `qdexport compile`, with several schedulers."""
    print(f"| scheduler | steps | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}", flush=True)
    for scheduler in schedulers or SCHEDULERS:
        for amount in steps or STEPS:
            row(out, scheduler, SampleRequest(prompts=("",) * count, steps=amount), draws, each)


if __name__ == "__main__":
    main()
