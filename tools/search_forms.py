"""Searches the forms of operators on UNets of real sizes with random weights, and adds them to the shipped table."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from benchmarks.command import run_command
from benchmarks.scale import MODELS

from qdexport.core.gpus import GPUS, gpu_named
from qdexport.core.recipe import load_recipe
from qdexport.core.target import target_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qdexport.core.recipe import Recipe
    from qdexport.core.target import Target
    from qdexport.pipeline.search import SearchFacts
    from qdexport.quant.attach import QuantizedModel

_EXAMPLES = """\b
Examples:
  python tools/search_forms.py --model unet50m                      show what a search finds
  python tools/search_forms.py --model sd15 --allow-re-rounding --cache ~/.cache/qdexport-search --write
"""
_ASSETS = Path(__file__).resolve().parents[1] / "qdexport" / "assets" / "forms"
_STEPS = 25  # rows of the time table


@click.command(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(list(MODELS)), default="unet50m", show_default=True, help="Size of UNet.")
@click.option("--recipe", "source", default="w8a8", show_default=True, help="A preset or a .yaml file.")
@click.option("--allow-re-rounding", is_flag=True, help="As --set allow_re_rounding=true.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="rtx-4090", show_default=True, help="Whose rates judge.")
@click.option("--seed", default=0, show_default=True, help="Chooses all that is given.")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Keep answers of the builder here.")
@click.option("--write", is_flag=True, help="Add what was found to qdexport/assets/forms, if it was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; nothing else.")
def cli(  # noqa: PLR0913  one argument per option
    model: str,
    source: str,
    allow_re_rounding: bool,
    gpu: str,
    seed: int,
    cache: Path | None,
    write: bool,
    as_json: bool,
) -> None:
    """Quantize a UNet with random weights and given ranges, and search the form of every operator.

    The whole network is built with the shipped table and with what was found; --write keeps the latter only if it is
    not worse. Repeat it when the builder changes.
    """
    from qdexport.cli.progress import Progress
    from qdexport.cli.search import show_search
    from qdexport.core.forms import FormTable
    from qdexport.pipeline.search import FORMS_FILE, search_network

    target = target_named("tensorrt-rtx")
    recipe = load_recipe(source, {"allow_re_rounding": True} if allow_re_rounding else {})
    with _folder() as folder:
        facts: SearchFacts = search_network(
            _quantized(model, recipe, seed),
            target,
            gpu_named(gpu),
            folder,
            cache or folder / "cache",
            progress=Progress(quiet=as_json),
        )
        if write and facts.kept:
            FormTable.load(folder / FORMS_FILE).save(_table(target))
    if as_json:
        click.echo(facts.model_dump_json(indent=2, exclude_defaults=True))
    else:
        show_search(facts)


def _table(target: Target) -> Path:
    return _ASSETS / f"{target.name}.json"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qdexport-search-") as name:
        yield Path(name)


def _quantized(name: str, recipe: Recipe, seed: int) -> QuantizedModel:
    import diffusers
    import torch
    from benchmarks.synthetic import ddim_timesteps, synthetic_plans, synthetic_ranges

    from qdexport.models.load import loaded_from_denoiser
    from qdexport.models.synthetic import random_unet
    from qdexport.quant.attach import quantize_model

    diffusers.utils.logging.set_verbosity_error()
    loaded = loaded_from_denoiser(random_unet(MODELS[name], torch.float16), name=name)
    plans = synthetic_plans(loaded, recipe, seed)
    ranges = synthetic_ranges(loaded, plans, recipe, ddim_timesteps(_STEPS), seed)
    return quantize_model(loaded, plans, recipe, ranges)


def main() -> None:
    """Runs the command line."""
    run_command(cli)


if __name__ == "__main__":
    main()
