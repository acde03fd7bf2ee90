from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from qdexport.cli.main import cli
from qdexport.core.recipe import load_recipe
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.pipeline.quantize import plan_model
from qdexport.quant.attach import quantize_model
from qdexport.quant.plan import activation_keys
from qdexport.quant.ranges import ActivationRanges

# a pipeline with random weights: three steps and two images exercise every stage in seconds
SMALL = (
    "--set", "calibration.prompts=2", "--set", "calibration.steps=3", "--set", "validation.images=2",
    "--set", "validation.floor_seeds=4", "--set", "validation.floor_steps=3",
)  # fmt: skip
AS_COMPILED = ("--recipe", "w8a8-timestep", "--set", "time_embedding=steps", *SMALL)  # how `compiled` was made


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-sd", "sd")


@pytest.fixture
def qdexport():
    """Runs the command line in this process: ``qdexport("compile", ...)`` returns click's result."""

    def run(*arguments: object):
        return CliRunner().invoke(cli, [str(item) for item in arguments])

    return run


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, tiny_folder):
    """An output folder of a whole compilation for TensorRT-RTX; rows of scales and of time for its steps alone."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("compiled") / "out"
    result = CliRunner().invoke(cli, ["compile", str(tiny_folder), "--out", str(out), "--json", *AS_COMPILED])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def with_equal_ranges():
    """Makes the fake-quant model of a tiny denoiser with random weights; the ranges of row n are -n to n, from 1 on."""

    def make(changes, timesteps, denoiser="tiny_sd"):
        loaded = loaded_from_denoiser(random_unet(denoiser), name="tiny")
        recipe = load_recipe("w8a8", {"shapes.tokens": 4, **changes})
        plans = plan_model(loaded, recipe)
        rows = 1 if recipe.activation_rows == "static" else len(timesteps)
        ends = {key: torch.arange(1.0, rows + 1) for plan in plans for key in activation_keys(plan)}
        ranges = ActivationRanges(low={key: -end for key, end in ends.items()}, high=ends, timesteps=timesteps)
        return quantize_model(loaded, plans, recipe, ranges)

    return make
