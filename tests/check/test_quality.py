from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qdexport.check import quality as quality_module
from qdexport.check.quality import compare_quality
from qdexport.core.recipe import PictureLimits, Recipe, Shapes
from qdexport.core.results import Quality
from qdexport.models.denoiser import io_spec
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest, sample
from qdexport.models.synthetic import random_unet
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.quant.attach import QuantizedModel, quantize_model
from qdexport.quant.calibrate import calibrate
from qdexport.quant.plan import plan_layers
from tests.check.conftest import SYMMETRIC, Compiled, recipe_of


def shapes_model(bits: int) -> QuantizedModel:
    loaded = load_model("shapes")
    recipe = Recipe.model_validate(
        {
            **recipe_of([{"match": "*", "activation": {**SYMMETRIC, "bits": bits}}]).model_dump(),
            "calibration": {"prompts": 2, "batch_size": 2, "steps": 4},
            "validation": {"images": 3, "pictures": {"extend": 1}},
        }
    )
    plans = plan_layers(loaded.denoiser, recipe)
    return quantize_model(loaded, plans, recipe, calibrate(loaded, plans, recipe))


@pytest.fixture(scope="module")
def shapes() -> tuple[Quality, dict[str, np.ndarray]]:
    model = shapes_model(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_module, "_REAL_IMAGES", 200)  # enough for a covariance
        quality, images = compare_quality(model, None, io_spec(model.loaded, model.recipe.shapes, "fp32"))
    assert quality is not None
    return quality, images


def test_images_of_both_models_from_equal_noise(shapes: tuple[Quality, dict[str, np.ndarray]]) -> None:
    quality, images = shapes
    assert list(images) == ["fp", "quantized", "other_seed"]
    assert {batch.shape for batch in images.values()} == {(3, 3, 32, 32)}
    assert all(np.abs(batch).max() <= 1 for batch in images.values())
    assert (quality.images, quality.steps, quality.seed) == (3, 4, 0)
    assert quality.onnx is None
    # other noise, and not the same pictures
    assert not np.array_equal(images["fp"], images["other_seed"])


def test_scores_are_those_of_the_images(shapes: tuple[Quality, dict[str, np.ndarray]]) -> None:
    quality, images = shapes
    difference = images["quantized"].astype(np.float64) - images["fp"]
    mse = float((difference**2).mean())
    scores = quality.quantized
    # the metric is computed in FP32
    assert scores.mse == pytest.approx(mse, rel=1e-6)
    assert scores.psnr_db == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)  # the peak is 2
    assert scores.ssim is not None
    assert 0.3 < scores.ssim < 1
    assert quality.fp.mse is None


def test_a_model_with_an_evaluator_is_judged_by_it(shapes: tuple[Quality, dict[str, np.ndarray]]) -> None:
    quality, _ = shapes
    for scores in (quality.fp, quality.quantized):
        assert scores.alignment in {0, 1 / 3, 2 / 3, 1}
        assert scores.frechet is not None
        assert scores.frechet > 0
    assert quality.fp.frechet_fp is None
    assert quality.quantized.frechet_fp is not None
    assert quality.quantized.frechet_fp < quality.quantized.frechet


def test_an_evaluator_reads_its_own_size_only() -> None:
    """A network for other sizes (a profile of a larger picture, for instance) is compared without it."""
    model = shapes_model(8)
    quality, images = compare_quality(model, None, io_spec(model.loaded, Shapes(height=16, width=8), "fp32"))
    assert images["fp"].shape == (3, 3, 64, 32)
    assert quality is not None
    assert quality.quantized.mse is not None
    assert (quality.fp.alignment, quality.quantized.frechet) == (None, None)


def test_the_error_is_that_of_latents_on_their_own_ways(
    shapes: tuple[Quality, dict[str, np.ndarray]],
) -> None:
    quality, _ = shapes
    rows = quality.error_per_step
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    timesteps = [row["timestep"] for row in rows]
    assert timesteps == sorted(timesteps, reverse=True)
    assert "quantized_mse" not in rows[0]  # all start from the same noise
    assert all(row["quantized_mse"] > 0 for row in rows[1:])
    # 8 bits: neither equal nor another image
    assert all(10 < row["quantized_sqnr_db"] < 80 for row in rows[1:])


def test_fewer_bits_are_seen(
    shapes: tuple[Quality, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_module, "_REAL_IMAGES", 200)
    model = shapes_model(4)
    coarse, _ = compare_quality(model, None, io_spec(model.loaded, model.recipe.shapes, "fp32"))
    assert coarse is not None
    assert coarse.quantized.mse > 4 * shapes[0].quantized.mse
    # by far on the scale of another seed, too: 8 bits are a small part of it, 4 bits are not
    assert coarse.quantized.share is not None
    fine = shapes[0].quantized.share
    assert fine is not None
    assert fine.value < 0.2
    assert coarse.quantized.share.value > 4 * fine.value


def test_more_images_where_the_limit_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of images has no interval: the images are doubled until the recipe's number is reached."""
    monkeypatch.setattr(quality_module, "_REAL_IMAGES", 200)
    titles: list[str] = []

    @contextlib.contextmanager
    def track(title: str) -> Iterator[Callable[[int, int], None]]:
        titles.append(title)
        yield lambda done, total: None

    model = shapes_model(6)
    changes = {"images": 1, "pictures": PictureLimits(extend=2)}
    validation = model.recipe.validation.model_copy(update=changes)
    model = dataclasses.replace(model, recipe=model.recipe.model_copy(update={"validation": validation}))
    quality, images = compare_quality(model, None, io_spec(model.loaded, model.recipe.shapes, "fp32"), track)
    assert quality is not None
    assert titles == ["sampling images", "up to 2 images: a verdict is near its limit"]
    assert {column: len(batch) for column, batch in images.items()} == {"fp": 1, "quantized": 1, "other_seed": 1}
    for scores in (quality.fp, quality.quantized, quality.other_seed):
        assert scores is not None
        assert scores.images == 2
    assert quality.images == 2


def test_the_other_seed_has_the_same_class(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_pipeline(tmp_path / "ddpm", "class"))
    seen: list[torch.Tensor] = []
    for noise in (None, 7):
        request = SampleRequest(prompts=("", ""), seed=3, noise_seed=noise, steps=2)
        sample(loaded, request, on_call=lambda step, timestep, inputs: seen.append(inputs["class_labels"].clone()))
    assert torch.equal(seen[0], seen[-1])


def test_the_onnx_file_is_a_column_of_its_own(static: Compiled) -> None:
    seen: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def track(title: str) -> Iterator[Callable[[int, int], None]]:
        assert title == "sampling images"
        yield lambda *state: seen.append(state)

    quality, images = compare_quality(static.model, static.path, static.io, track)
    assert list(images) == ["fp", "quantized", "onnx"]  # random weights: another seed tells nothing
    assert quality is not None
    assert quality.onnx is not None
    assert quality.onnx.alignment is None
    # the file is the fake-quant model up to a few flipped codes
    assert quality.onnx.mse == pytest.approx(quality.quantized.mse, rel=0.1)
    assert quality.not_judged is not None
    assert "initializer" in quality.not_judged
    assert quality.quantized.share is None
    assert seen[-1] == (9, 9)  # three denoisers, three steps, one batch
    assert [done for done, _ in seen] == list(range(1, 10))


def test_a_model_without_a_pipeline_makes_no_images(static: Compiled) -> None:
    from dataclasses import replace

    from qdexport.models.load import loaded_from_denoiser

    bare = replace(static.model, loaded=loaded_from_denoiser(random_unet("tiny_sd"), name="bare"))
    assert compare_quality(bare, static.path, static.io) == (None, {})
