"""A tiny pipeline, quantized in every way that the passes tell apart, and compiled once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from qdexport.check.calls import check_calls
from qdexport.core.io_spec import IoSpec
from qdexport.core.recipe import Recipe
from qdexport.core.target import target_named
from qdexport.models.denoiser import shortcut_splits
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.sampling import DenoiserCall
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.quant.attach import QuantizedModel, quantize_model
from qdexport.quant.calibrate import calibrate
from qdexport.quant.plan import plan_layers

WEIGHT = {"bits": 8, "granularity": "per_channel"}
SYMMETRIC = {"bits": 8}
UNSIGNED = {"bits": 8, "symmetric": False, "signed": False}
NARROW = {"bits": 6, "symmetric": False, "signed": False}


@dataclass(frozen=True)
class Compiled:
    """A fake-quant model, its ONNX file, and denoiser calls of its sampler at all three timesteps."""

    model: QuantizedModel
    path: Path
    io: IoSpec
    calls: list[DenoiserCall]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sd", "sd"))


def compile_tiny(loaded: LoadedModel, folder: Path, recipe: Recipe, *, split: bool) -> Compiled:
    splits = shortcut_splits(loaded.denoiser) if split else None
    plans = plan_layers(loaded.denoiser, recipe, splits=splits)
    model = quantize_model(loaded, plans, recipe, calibrate(loaded, plans, recipe))
    lowered = lower_to_onnx(model, folder, target_named("onnxruntime"))
    calls = check_calls(model, lowered.facts.io, 3, seed=0)
    return Compiled(model=model, path=lowered.file.path, io=lowered.facts.io, calls=calls)


def recipe_of(rules: list[dict[str, object]], **changes: object) -> Recipe:
    data = {
        "name": "test",
        "rules": [{"weight": WEIGHT, **rule} for rule in rules],
        "time_embedding": "steps",  # a table of three rows: most timesteps have none
        "calibration": {"prompts": 2, "batch_size": 2, "steps": 3, "guidance_scale": 3.0},
        "validation": {"images": 2, "floor_seeds": 2, "floor_steps": 3},
    }
    return Recipe.model_validate({**data, **changes})


@pytest.fixture(scope="session")
def static(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """FP32 body, static scales: symmetric, unsigned with a zero point, and 6-bit quantizers."""
    rules = [
        {"match": "*", "activation": SYMMETRIC},
        {"match": "*.conv1", "activation": UNSIGNED},
        {"match": ["*.attn2.*", "*.ff.*"], "activation": NARROW},
    ]
    return compile_tiny(tiny, tmp_path_factory.mktemp("static") / "onnx", recipe_of(rules), split=False)


@pytest.fixture(scope="session")
def stepped(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """FP16 body, unsigned codes with scales per step, split shortcuts."""
    recipe = recipe_of([{"match": "*", "activation": UNSIGNED}], body="fp16", activation_rows="per_step")
    return compile_tiny(tiny, tmp_path_factory.mktemp("stepped") / "onnx", recipe, split=True)


@pytest.fixture
def changed(static: Compiled, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """Writes a copy of the static model's file after a change to it."""

    def change(edit: Callable[[onnx.ModelProto], None]) -> Path:
        proto = onnx.load(static.path)
        edit(proto)
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        return path

    return change


@pytest.fixture
def own_copy(static: Compiled, tmp_path: Path) -> Path:
    return Path(shutil.copy(static.path, tmp_path / "model.onnx"))
