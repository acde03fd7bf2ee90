"""Trains the bundled models `shapes` and `shapes-turbo` from nothing, two small ones for tests, and measures them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click
from benchmarks.command import run_command

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink

_FOLDER = click.Path(file_okay=False, path_type=Path)
_MODEL = click.Path(exists=True, file_okay=False, path_type=Path)
_BASE_EXAMPLES = """\b
Examples:
  python tools/train_shapes.py base out/shapes
  python tools/train_shapes.py base out/shapes --seed 3 --work /tmp/shapes-work
  python tools/train_shapes.py base out/try --smoke
"""
_DISTIL_EXAMPLES = """\b
Examples:
  python tools/train_shapes.py distil out/shapes-turbo
  python tools/train_shapes.py distil out/shapes-turbo --teacher out/shapes
  python tools/train_shapes.py --threads 1 distil out/try --smoke
"""
_SMALL_EXAMPLES = """\b
Examples:
  python tools/train_shapes.py small classes out/shapes-classes
  python tools/train_shapes.py --threads 1 small velocity out/shapes-velocity
"""
_MEASURE_EXAMPLES = """\b
Examples:
  python tools/train_shapes.py measure qdexport/assets/shapes
  python tools/train_shapes.py measure qdexport/assets/shapes-turbo --steps 4 --guidance 1
"""


@click.group(epilog="Each command has examples: python tools/train_shapes.py COMMAND --help")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads.")
@click.pass_context
def cli(context: click.Context, threads: int) -> None:
    """Train the bundled shapes models from nothing, and measure them.

    Every command may be interrupted and started again: it goes on from its work folder.
    """
    context.obj = threads


@cli.command(epilog=_BASE_EXAMPLES)
@click.argument("folder", type=_FOLDER)
@click.option("--work", type=_FOLDER, help="Checkpoints. [default: FOLDER.work]")
@click.option("--seed", default=0, show_default=True, help="Chooses pictures, initial weights and noise.")
@click.option("--smoke", is_flag=True, help="A few steps of every stage, to see that the tool runs.")
@click.pass_obj
def base(threads: int, folder: Path, work: Path | None, seed: int, smoke: bool) -> None:
    """Train evaluator, autoencoder, text encoder and UNet, and write the diffusers folder FOLDER.

    About four hours on two cores.
    """
    _prepare(threads)
    from shapes_training.base import train_base
    from shapes_training.settings import BaseSettings

    settings = BaseSettings.smoke(seed) if smoke else BaseSettings.full(seed)
    train_base(folder, work or _work_beside(folder), settings, _progress())


@cli.command(epilog=_DISTIL_EXAMPLES)
@click.argument("folder", type=_FOLDER)
@click.option("--teacher", type=_MODEL, help="A shapes model folder. [default: the bundled shapes]")
@click.option("--work", type=_FOLDER, help="Paths and checkpoints. [default: FOLDER.work]")
@click.option("--seed", default=0, show_default=True, help="Chooses captions and noise.")
@click.option("--smoke", is_flag=True, help="A few steps of every stage, to see that the tool runs.")
@click.pass_obj
def distil(threads: int, folder: Path, teacher: Path | None, work: Path | None, seed: int, smoke: bool) -> None:
    """Distil a shapes model into one that needs four steps and no guidance, and write it to FOLDER.

    About an hour on two cores.
    """
    from shapes_training.distil import distil as run
    from shapes_training.settings import DistilSettings

    _prepare(threads)
    from qdexport.models.shapes import bundled_model_path

    settings = DistilSettings.smoke(seed) if smoke else DistilSettings.full(seed)
    run(teacher or bundled_model_path("shapes"), folder, work or _work_beside(folder), settings, _progress())


@cli.command(epilog=_SMALL_EXAMPLES)
@click.argument("kind", type=click.Choice(["classes", "velocity"]))
@click.argument("folder", type=_FOLDER)
@click.option("--work", type=_FOLDER, help="The checkpoint. [default: FOLDER.work]")
@click.option("--seed", default=0, show_default=True, help="Chooses pictures, initial weights and noise.")
@click.option("--smoke", is_flag=True, help="A few steps, to see that the tool runs.")
@click.pass_obj
def small(threads: int, kind: str, folder: Path, work: Path | None, seed: int, smoke: bool) -> None:
    """Train a model of a kind that the bundled ones are not, in some minutes of one core, and write it to FOLDER.

    classes: a class-conditional UNet2DModel (pictures of one thing, 16 x 16, DDIM). velocity: `shapes` with
    prediction_type v_prediction, taught by the bundled one.
    """
    _prepare(threads)
    from shapes_training.small import SmallSettings, train_classes, train_velocity

    train = {"classes": train_classes, "velocity": train_velocity}[kind]
    settings = SmallSettings.smoke(seed) if smoke else getattr(SmallSettings, kind)(seed)
    train(folder, work or _work_beside(folder), settings, _progress())


@cli.command(epilog=_MEASURE_EXAMPLES)
@click.argument("folder", type=_MODEL)
@click.option("--images", default=256, show_default=True, type=click.IntRange(2), help="Pictures to sample.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Sampling steps.")
@click.option("--guidance", default=4.0, show_default=True, help="Classifier-free guidance; 1 is none.")
@click.option("--real", default=4000, show_default=True, type=click.IntRange(2), help="Real pictures.")
@click.option("--seed", default=0, show_default=True, help="Chooses captions and noise.")
@click.pass_obj
def measure(  # noqa: PLR0913 - one argument per option
    threads: int, folder: Path, images: int, steps: int, guidance: float, real: int, seed: int
) -> None:
    """Sample the model in FOLDER and print alignment and Frechet distance as JSON."""
    _prepare(threads)
    from shapes_training.measure import Sampling, measure_model

    sampling = Sampling(images=images, steps=steps, guidance=guidance, seed=seed)
    click.echo(json.dumps(measure_model(folder, sampling, real, _progress()), indent=2))


def _prepare(threads: int) -> None:
    """Sets the threads and quietens the libraries; apart, so that --help does not load them."""
    import torch

    torch.set_num_threads(threads)
    # loading and saving small models is not worth their bars and hints
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def _work_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.work")


def _progress() -> ProgressSink:
    from qdexport.cli.progress import Progress

    return Progress()


def main() -> None:
    """Runs the command line."""
    run_command(cli)


if __name__ == "__main__":
    main()
