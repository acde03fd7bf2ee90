"""``qdexport sample``: makes images with a model, its quantized version, or the compiled ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdexport.cli.console import make_progress, print_json, say
from qdexport.cli.options import Number, common
from qdexport.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["sample"]


@click.command(
    epilog="""\b
Examples:
  qdexport sample shapes --prompt "a red circle on a white background"
  qdexport sample out --with fp --with quantized --with onnx --count 4 --out pictures
  qdexport sample out --scheduler Euler --steps 50
  qdexport sample out --scheduler DPMSolverMultistep,timestep_spacing=trailing --steps 10
"""
)
@click.argument("source", metavar="MODEL_OR_OUT")
@click.option("--prompt", "prompts", multiple=True, help="Repeatable; default: prompts that suit the model.")
@click.option(
    "--count",
    type=click.IntRange(1, 100_000),
    default=4,
    show_default=True,
    help="Images, when no prompt is given.",
)
@click.option(
    "--with",
    "kinds",
    multiple=True,
    type=click.Choice(["fp", "quantized", "onnx"]),
    help="Which denoisers; default: fp for a model, quantized and onnx for an output folder.",
)
@click.option("--steps", type=click.IntRange(1, 10_000), help="Sampler steps; default: the model's or the recipe's.")
@click.option(
    "--scheduler",
    metavar="NAME[,KEY=VALUE...]",
    help="Another scheduler of diffusers, made from the settings of the model's, and settings that differ.",
)
@click.option("--guidance-scale", type=Number(0, 1e6), help="Classifier-free guidance; default: the model's.")
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Noise of image i comes from seed + i."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("pictures"),
    show_default=True,
    help="Folder for the PNG files.",
)
@common
def sample(source: str, prompts: tuple[str, ...], count: int, kinds: tuple[str, ...], **options: Any) -> None:
    """Sample images from a model, or side by side from an output folder of `qdexport compile`.

    `onnx` runs every network that was compiled in ONNX Runtime: the denoiser, and the text encoders and the VAE's
    decoder where the folder has them. Pictures of an earlier run in that folder are replaced, files of yours never.
    """
    from qdexport.core.owned import written_into
    from qdexport.models.sampling import SampleRequest, prompts_for
    from qdexport.pipeline.sampling import image_names, open_denoisers, save_images

    progress = make_progress(options["verbose"], options["as_json"])
    denoisers = open_denoisers(source, kinds, options["scheduler"])
    texts = prompts or tuple(prompts_for(denoisers.loaded, count, options["seed"])) or ("",) * count
    request = SampleRequest(
        prompts=texts,
        seed=options["seed"],
        steps=options["steps"] or denoisers.steps,
        guidance_scale=options["guidance_scale"],
    )
    denoisers.check(request)
    images: dict[str, np.ndarray] = {}
    with written_into(options["out"], image_names(denoisers.kinds, len(texts))):
        for kind in denoisers.kinds:
            with progress.stage(f"sampling with {kind}"):
                images[kind] = denoisers.sample(kind, request)
        paths = save_images(options["out"], images, list(texts))
    if options["as_json"]:
        print_json({"prompts": list(texts), "images": [str(path) for path in paths]})
    elif not paths:
        raise ModelError("nothing was sampled")
    else:
        say(f"{len(paths)} files in {options['out']}, the grid is {paths[-1]}")
