"""A configuration that asks for more than its weights, or than there is, is refused before memory is given to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qdexport.core.recipe import load_recipe
from qdexport.errors import ModelError, RecipeError
from qdexport.models import limits
from qdexport.models.limits import check_memory, check_numbers, construction_limit
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest, sample
from qdexport.models.tiny import save_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("limits") / "sd", "sd")


def _changed(folder: Path, tmp_path: Path, file: str, **values: Any) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"sample_size": 10**9}, r"unet/config\.json: sample_size is 1e\+09"),
        ("unet/config.json", {"block_out_channels": [32, 10**9]}, r"unet/config\.json: block_out_channels is 1e\+09"),
        ("unet/config.json", {"layers_per_block": 10**6}, r"unet/config\.json declares a network of more than"),
        ("unet/config.json", {"block_out_channels": [32, 64000]}, r"unet/config\.json declares a network of more than"),
        ("vae/config.json", {"block_out_channels": [64000]}, r"vae/config\.json declares a network of more than"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, r"text_encoder/config\.json declares a network"),
        ("text_encoder/config.json", {"vocab_size": 9_000_000}, r"text_encoder/config\.json declares a network"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1e"),
    ],
)
def test_a_configuration_larger_than_its_weights(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    model = _changed(folder, tmp_path, file, **values)
    with pytest.raises(ModelError, match=message):
        load_model(model)


def test_numbers_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    check_numbers(path, {"a": [1, {"b": True}], "rope_theta": 1e9, "vocab_size": 300_000, "x": "10" * 99, "y": None})
    with pytest.raises(ModelError, match=r"config\.json: a\.b is 1e\+30"):
        check_numbers(path, {"a": [1, {"b": 10**30}]})


def test_the_limit_is_gone_after_the_block() -> None:
    with pytest.raises(ModelError, match="declares a network"), construction_limit(Path("c.json"), 1, 1):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2000))
    torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2000))


def test_modules_without_weights_are_counted_too() -> None:
    with pytest.raises(ModelError, match=r"more than .* modules"), construction_limit(Path("c.json"), 1, 1):
        torch.nn.ModuleList(torch.nn.Dropout() for _ in range(10_000))


def test_memory_is_named_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda: 2_000_000_000)
    check_memory("this", 1.9e9, "nothing")
    with pytest.raises(RecipeError, match=r"^this needs at least 2\.1 GB of memory, and 2\.0 of .* free; do less$"):
        check_memory("this", 2.1e9, "do less", RecipeError)


def test_a_batch_that_cannot_fit_is_refused_before_it_is_sampled(folder: Path) -> None:
    loaded = load_model(folder)
    request = SampleRequest(prompts=("x",), steps=1, height=800_000, width=800_000)
    with pytest.raises(ModelError, match=r"sampling .* latents of 800000 x 800000 at once needs at least .* GB"):
        sample(loaded, request)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration.prompts", 10**9), ("calibration.steps", 10**9), ("calibration.batch_size", 10**9),
        ("calibration.seed", 2**64), ("calibration.guidance_scale", float("nan")), ("validation.images", 10**9),
        ("validation.floor_seeds", 10**9), ("validation.golden", 10**9), ("shapes.batch", 10**9), ("shapes.batch", 0),
        ("shapes.height", [1, 2, 10**9]), ("channel_scale.max_ratio", float("inf")),
        ("activation_rows", {"method": "uniform", "count": 10**9}), ("bit_allocation.candidates", 10**9),
        ("bit_allocation.weight_target", float("nan")), ("rules.0.activation.observer.exponent", float("inf")),
    ],
)  # fmt: skip
def test_a_slip_of_the_keyboard_is_no_run_of_weeks(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key.rpartition(".")[2]):
        load_recipe("w8a8", {key: value})
