from __future__ import annotations

import pytest
from click.testing import CliRunner

from qdexport.cli.main import cli
from qdexport.models.tiny import save_tiny_pipeline

# a pipeline with random weights: three steps and two images exercise every stage in seconds
SMALL = (
    "--set", "calibration.prompts=2", "--set", "calibration.steps=3", "--set", "validation.images=2",
    "--set", "validation.floor_seeds=4", "--set", "validation.floor_steps=3",
)  # fmt: skip


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
    """An output folder of a whole compilation for TensorRT-RTX, per-step scales."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("compiled") / "out"
    arguments = ["compile", str(tiny_folder), "--recipe", "w8a8-timestep", "--out", str(out), "--json", *SMALL]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return out
