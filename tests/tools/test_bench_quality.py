"""The quality benchmark: its rows, its intervals, its cache, and one tiny run of the table and of a user's pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import nn

from qdexport.core.recipe import load_recipe, preset_names
from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.errors import MissingDependencyError, OutputError, RecipeError
from qdexport.models.shapes_evaluator import frechet_distance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.quality_scores import Scored

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_quality.py"


@pytest.fixture(autouse=True, scope="module")
def tool_modules() -> Iterator[None]:
    """Makes `benchmarks` importable, as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield


def run_tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


# --- rows ---


def shipped_rows() -> Any:
    from benchmarks.quality_rows import load_rows

    return load_rows(ROOT / "tools" / "benchmarks" / "quality_rows.yaml")


def write_rows(folder: Path, **changes: Any) -> Path:
    rules = [{"match": "*", "weight": {"bits": 8}, "activation": {"bits": 8}}]
    data: dict[str, Any] = {
        "recipes": {"plain": {"rules": rules}},
        "rows": [
            {"name": "fp", "group": "baselines"},
            {"name": "a", "group": "ours", "recipe": "plain", "set": {"rules.0.weight.bits": 4}},
        ],
    }
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump(data | changes), encoding="utf-8")
    return path


def test_the_shipped_rows_have_usable_recipes_and_hold_every_preset() -> None:
    from benchmarks.quality_rows import resolve_rows

    rows = resolve_rows(shipped_rows())
    named = {row.source.partition(",")[0] for row in rows}
    assert set(preset_names()) <= named
    assert all((row.recipe is None) == (row.source == "floating point") for row in rows)


def test_naive_rows_quantize_the_ends_and_the_time_embedding_with_8_bits() -> None:
    from benchmarks.quality_rows import resolve_rows

    row = next(row for row in resolve_rows(shipped_rows()) if row.name == "naive-w4a4-rows")
    recipe = row.recipe
    assert recipe is not None
    inner, ends = recipe.rules
    assert (inner.weight.bits, inner.activation.bits, recipe.activation_rows) == (4, 4, "per_step")
    assert (ends.weight.bits, ends.activation.bits, recipe.time_embedding) == (8, 8, "keep")
    assert ends.matches("conv_in", "conv")
    assert ends.matches("time_embedding.linear_1", "linear")
    assert not ends.matches("down_blocks.0.resnets.0.time_emb_proj", "linear")
    assert (inner.weight.symmetric, inner.weight.granularity) == (True, "per_channel")
    assert (inner.activation.symmetric, inner.weight.observer.kind, inner.activation.observer.kind) == (
        False,
        "minmax",
        "minmax",
    )
    assert recipe.calibration.prompts == 32


def test_a_preset_without_a_row_gets_one_only_where_the_file_asks(tmp_path: Path) -> None:
    from benchmarks.quality_rows import load_rows

    assert [row.name for row in load_rows(write_rows(tmp_path)).rows] == ["fp", "a"]
    rows = load_rows(write_rows(tmp_path, presets={"group": "recipes"})).rows
    assert [row.name for row in rows[2:]] == preset_names()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "fp", "group": "x"}] * 2}, "two rows named 'fp'"),
        ({"comparisons": [{"row": "a", "against": "b"}]}, "no row of this name"),
        ({"rows": [{"name": "a", "group": "x", "recipe": "plain"}]}, "must have one row without recipe"),
        ({"rows": [{"name": "fp", "group": "x", "colour": "red"}]}, "colour"),
    ],
)
def test_a_wrong_file_of_rows_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from benchmarks.quality_rows import load_rows

    with pytest.raises(RecipeError, match=message):
        load_rows(write_rows(tmp_path, **changes))


def test_a_wrong_recipe_names_its_row(tmp_path: Path) -> None:
    from benchmarks.quality_rows import load_rows, resolve_rows

    rows = [{"name": "fp", "group": "x"}, {"name": "bad", "group": "x", "recipe": "w8a8", "set": {"body": "int3"}}]
    with pytest.raises(RecipeError, match=r"row 'bad'.*body"):
        resolve_rows(load_rows(write_rows(tmp_path, rows=rows)))


def test_choosing_rows_brings_their_reference_along(tmp_path: Path) -> None:
    from benchmarks.quality_rows import choose_rows

    rows = shipped_rows()
    assert [row.name for row in choose_rows(rows, [], ["naive-w8a8"])] == ["fp", "naive-w8a8"]
    assert {row.model for row in choose_rows(rows, ["turbo"], [])} == {"shapes-turbo"}
    with pytest.raises(RecipeError, match="no rows are of the group 'nothing'"):
        choose_rows(rows, ["nothing"], [])
    with pytest.raises(RecipeError, match="no row is named"):
        choose_rows(rows, [], ["nothing*"])


# --- scores ---


def readings(features: np.ndarray, aligned: np.ndarray | None = None) -> Any:
    from benchmarks.quality_scores import Readings

    count = len(features)
    aligned = np.ones(count) if aligned is None else aligned
    return Readings(features=features, aligned=aligned, right=4 * aligned, counted=np.full(count, 4.0))


def scored(noise: np.random.Generator, count: int = 200, shift: float = 0.0) -> Scored:
    from benchmarks.quality_scores import Scored, moments

    reference = noise.normal(size=(count, 6))
    return Scored(
        mse=noise.exponential(1e-3, size=count) + shift,
        ssim=noise.uniform(0.9, 1, size=count),
        readings=readings(reference + 0.1 * noise.normal(size=(count, 6)) + shift),
        reference=readings(reference),
        real=moments(noise.normal(size=(5000, 6))),
    )


def test_frechet_of_moments_is_the_distance_of_the_features(noise: np.random.Generator) -> None:
    from benchmarks.quality_scores import frechet, moments

    a, b = noise.normal(size=(90, 7)), 0.5 + 2 * noise.normal(size=(70, 7))
    # the same formula in float64; only the order of sums differs
    assert frechet(moments(a), moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_image_scores_are_per_image_and_zero_for_equal_images(noise: np.random.Generator) -> None:
    from benchmarks.quality_scores import score_images

    reference = noise.uniform(-1, 1, size=(3, 3, 16, 16)).astype(np.float32)
    images = reference.copy()
    images[1] += 0.5
    mse, ssim = score_images(images, reference)
    # 0.5 is exact in binary; adding it to FP32 values rounds by at most 2^-24 relative
    np.testing.assert_allclose(mse, [0, 0.25, 0], rtol=1e-6, atol=0)
    np.testing.assert_allclose(ssim[[0, 2]], 1, rtol=1e-6)
    assert ssim[1] < 1


def test_the_interval_of_a_mean_is_the_textbook_one(noise: np.random.Generator) -> None:
    from benchmarks.quality_scores import estimate

    row = scored(noise, count=400)
    found = estimate(row, "mse")
    assert found is not None
    assert found.value == pytest.approx(row.mse.mean(), rel=1e-12)
    half = 1.96 * row.mse.std() / np.sqrt(400)
    # 1000 resamples know an end to about 5 % of the half width, and the exponential is skewed: 20 %
    assert found.high - found.value == pytest.approx(half, rel=0.2)
    assert found.value - found.low == pytest.approx(half, rel=0.2)


def test_psnr_is_that_of_the_mean_error(noise: np.random.Generator) -> None:
    from benchmarks.quality_scores import estimate

    row = scored(noise)
    found = estimate(row, "psnr_db", images=100)
    assert found is not None
    assert found.value == pytest.approx(10 * np.log10(4 / row.mse[:100].mean()), rel=1e-12)
    assert found.images == 100


@pytest.mark.parametrize("metric", ["frechet_fp", "frechet_real"])
def test_the_interval_of_a_frechet_distance_holds_the_distance(noise: np.random.Generator, metric: Any) -> None:
    from benchmarks.quality_scores import estimate

    found = estimate(scored(noise, shift=0.3), metric)
    assert found is not None
    assert found.low < found.value < found.high


def test_what_was_not_measured_has_no_estimate() -> None:
    from benchmarks.quality_scores import Scored, estimate

    row = Scored(mse=np.ones(3), ssim=np.ones(3))
    assert estimate(row, "alignment") is None
    assert estimate(row, "frechet_real") is None


def test_paired_differences_cancel_what_rows_share(noise: np.random.Generator) -> None:
    from benchmarks.quality_scores import Scored, estimate, paired_difference, paired_ratio

    hard = noise.exponential(1e-3, size=300)  # errors that depend on the prompt, the same for both rows
    a, b = (Scored(mse=hard + extra, ssim=np.ones(300)) for extra in (2e-5, 0.0))
    difference = paired_difference(a, b, "mse")
    apart = estimate(a, "mse")
    assert difference is not None
    assert apart is not None
    assert difference.value == pytest.approx(2e-5, rel=1e-9)
    assert not difference.holds_zero
    ratio = paired_ratio(a, b, "mse", images=100)
    assert ratio is not None
    assert ratio.images == 100
    assert 1 < ratio.low < ratio.value < ratio.high
    assert paired_ratio(a, Scored(mse=np.zeros(300), ssim=np.ones(300)), "mse") is None
    assert apart.low < b.mse.mean() < apart.high  # the rows' own intervals could not tell them apart


@pytest.mark.parametrize("metric", ["mse", "psnr_db", "ssim", "alignment", "attributes", "frechet_fp", "frechet_real"])
def test_a_row_does_not_differ_from_itself(noise: np.random.Generator, metric: Any) -> None:
    from benchmarks.quality_scores import paired_difference

    row = scored(noise, count=40)
    difference = paired_difference(row, row, metric)
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert difference.holds_zero


# --- widths ---


def test_average_widths_count_weights_and_values() -> None:
    from benchmarks.quality_model import average_widths

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
            self.first, self.second, self.time = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(5, 5)

    def plan(name: str, bits: int | None, macs: int, **more: Any) -> LayerPlan:
        spec = None if bits is None else QuantSpec(bits=bits)
        kind = "conv" if name == "conv" else "linear"
        return LayerPlan(name=name, kind=kind, weight=spec, activation=spec, macs=macs, **more)

    # conv: 4 x 16 x 16 in, 8 x 8 x 8 out; linears: 64 tokens of 8
    conv_macs, linear_macs = 8 * 8 * 8 * 4 * 9, 64 * 8 * 6
    plans = (
        plan("conv", 4, conv_macs, group="conv"),
        plan("first", 8, linear_macs, group="tokens"),
        plan("second", 8, linear_macs, group="tokens"),
        plan("time", 8, 25, folded=True),
    )
    from benchmarks import quality_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_model, "input_groups", lambda _: {})  # the net is no UNet
        model = SimpleNamespace(loaded=SimpleNamespace(denoiser=Net()), plans=plans)
        widths = average_widths(model)
    weights, values = {4: 288, 8: 2 * 48}, {4: 4 * 16 * 16, 8: 64 * 8}  # the shared tensor once
    assert widths.weight_bits == pytest.approx((4 * 288 + 8 * 96) / sum(weights.values()))
    assert widths.activation_bits == pytest.approx((4 * 1024 + 8 * 512) / sum(values.values()))
    assert (widths.quantized, widths.layers) == (3, 3)


# --- store ---


def store(cache: Path, *, source: str = "s1", reuse: bool = False, recipe: str | None = "w8a8", **job: Any) -> Any:
    from benchmarks.quality_store import RowJob, RowStore

    made = RowJob(
        model="shapes",
        recipe=None if recipe is None else load_recipe(recipe),
        prompts=job.pop("prompts", ("a", "b", "c", "d", "e")),
        batch_size=2,
        **job,
    )
    return RowStore(cache, made, model="m", source=source, reuse=reuse)


def fill(row: Any, value: float) -> None:
    from benchmarks.quality_store import write_batch, write_facts

    for batch in row.batches():
        write_batch(batch.path, images=np.full((batch.count, 3, 4, 4), value, np.float32))
    write_facts(row.facts_path, {"seconds": value})


def test_a_store_finds_its_own_images_only(tmp_path: Path) -> None:
    row = store(tmp_path)
    assert not row.complete
    fill(row, 1)
    assert row.complete
    assert row.images().shape == (5, 3, 4, 4)
    others = [
        store(tmp_path, recipe="w4a8"),
        store(tmp_path, recipe=None),
        store(tmp_path, steps=3),
        store(tmp_path, noise_seed=1),
        store(tmp_path, source="s2"),
        store(tmp_path, prompts=("x", "b", "c", "d", "e")),
    ]
    assert [other.complete for other in others] == [False] * 6


def test_a_longer_row_starts_from_the_batches_that_are_there(tmp_path: Path) -> None:
    fill(store(tmp_path, prompts=("a", "b", "c", "d")), 1)
    found = [batch.found for batch in store(tmp_path, prompts=tuple("abcdefg")).batches()]
    assert found == [True, True, False, False]


def test_reuse_takes_the_newest_images_of_older_code(tmp_path: Path) -> None:
    for age, (source, value) in enumerate((("old", 1), ("newer", 2))):
        row = store(tmp_path, source=source)
        fill(row, value)
        for batch in row.batches():
            os.utime(batch.path, (age, age))
    assert not store(tmp_path, source="now").complete
    row = store(tmp_path, source="now", reuse=True)
    assert row.complete
    assert (row.images() == 2).all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    row = store(tmp_path)
    fill(row, 1)
    row.batches()[1].path.write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(OutputError, match=row.batches()[1].path.name):
        row.images()


def test_the_digest_of_a_model_follows_its_contents(tmp_path: Path) -> None:
    from benchmarks.quality_store import model_digest

    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "weights"
    file.write_bytes(b"one")
    before = model_digest(tmp_path)
    os.utime(file, (1, 1))
    assert model_digest(tmp_path) == before
    file.write_bytes(b"two")
    assert model_digest(tmp_path) != before


# --- pages ---


def figures() -> dict[str, Any]:
    def score(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "images": 8}

    def row(title: str, **more: Any) -> dict[str, Any]:
        return {
            "title": title,
            "model": "shapes",
            "scores": {"alignment": score(0.9)},
            "psnr_image_db": None,
            "large": None,
            "error_per_step": None,
            "first": {},
            **more,
        }

    steps = [{"step": i, "timestep": 900 - i, "mse": i * 1e-3} for i in range(4)]
    scores = {"mse": score(1e-3), "psnr_db": score(36), "ssim": score(0.98), "frechet_fp": score(12)}
    quantized = row(
        "naive W8A8",
        scores={**scores, "alignment": score(0.8)},
        psnr_image_db=37.0,
        error_per_step=steps,
        first={"mse": 5e-3, "frechet_fp": 12.5},
        weight_bits=8.0,
        activation_bits=8.0,
        seconds=30.0,
    )
    difference = {"value": -0.1, "low": -0.2, "high": 0.01, "images": 8, "measurable": False, "ratio": None}
    return {
        "settings": {
            "steps": {"shapes": 25},
            "guidance_scale": {"shapes": 4.0},
            "prompt_seed": 0,
            "prompts_kept_out": 3,
            "real_images": 100,
        },
        "machine": {"processor": "a processor", "cores": 2},
        "rows": {"fp": row("FP32"), "naive-w8a8": quantized},
        "comparisons": [{"row": "naive-w8a8", "against": "fp", "differences": {"alignment": difference}}],
    }


def test_the_page_states_values_intervals_differences_and_first_figures() -> None:
    from benchmarks.quality_docs import quality_markdown

    page = quality_markdown(figures(), {"pictures/x.png": "A plot"})
    assert "| naive W8A8 | 8.00 | 8.00 | 1.00e-03 (9.00e-04 to 1.10e-03) | 36.0 (32.4 to 39.6) |" in page
    assert "| naive W8A8 minus FP32 | alignment | 8 | -0.100 (-0.200 to 0.010) |  | no |" in page
    assert "1.00e-03 / 5.00e-03 *" in page  # outside the interval
    assert "12 / 12.5 |" in page  # inside it
    assert "![A plot](pictures/x.png)" in page
    assert max(map(len, page.splitlines())) < 400


def test_some_rows_of_the_page_are_replaced() -> None:
    from benchmarks.quality_docs import updated_figures

    def row(digest: str | None, mse: float) -> dict[str, Any]:
        return {"recipe_digest": digest, "mse": mse}

    pairs = [{"row": "a", "against": "b", "n": 1}, {"row": "b", "against": "c", "n": 1}, {"row": "c", "against": "b"}]
    known = {"rows": {"fp": row(None, 0), "b": row("b", 1), "c": row("c", 1), "d": row("d", 1)}, "comparisons": pairs}
    found = {"rows": {"fp": row(None, 9), "a": row("a", 2), "b": row("B", 2)}, "comparisons": [pairs[0] | {"n": 2}]}
    updated = updated_figures(known, found, ["fp", "a", "b", "c"])
    # the floating-point row of a page has more images than what one row is measured with
    assert {name: item["mse"] for name, item in updated["rows"].items()} == {"fp": 0, "a": 2, "b": 2, "c": 1, "d": 1}
    assert list(updated["rows"]) == ["fp", "a", "b", "c", "d"]
    # a difference of the old b is true no more
    assert updated["comparisons"] == [pairs[0] | {"n": 2}]


def test_plots_are_written(tmp_path: Path) -> None:
    from benchmarks.quality_plots import plot_errors, plot_pictures, plot_steps

    rows, row = figures()["rows"], store(tmp_path)
    fill(row, 0.5)
    assert plot_errors(rows, tmp_path / "errors.png")
    assert plot_steps(rows, ["naive-w8a8", "not measured"], tmp_path / "steps.png")
    assert plot_pictures({"fp": row}, {"fp": "FP32"}, tmp_path / "images.png")
    for name in ("errors", "steps", "images"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 200
    assert not plot_errors({"fp": rows["fp"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- a user's own pipeline ---


def test_missing_packages_and_weights_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import quality_networks as networks

    images = np.zeros((2, 3, 8, 8), np.float32)
    references = networks.ReferenceImages(floating_point=images, real=None, prompts=("a", "b"))
    found = networks.Networks(hub=tmp_path, clip="nobody/no-clip")
    rows: dict[str, dict[str, Any]] = {"FP": {"scores": {}}}
    for package in (None, object()):  # not installed, then installed without weights
        with monkeypatch.context() as patch:
            patch.setattr(networks.importlib.util, "find_spec", lambda _, package=package: package)
            missing = networks.network_scores(rows, {"FP": images}, references, found, SimpleNamespace())
        wanted = ("pip install", "hf download") if package is None else ("there is no", "hf download")
        assert wanted[0] in missing["FID, sFID"]
        assert wanted[0] in missing["LPIPS"]
        assert wanted[1] in missing["CLIP score"]
        assert "--real" in missing["FID, sFID to real images"]
    assert rows == {"FP": {"scores": {}}}


def test_sfid_reads_seven_channels_of_the_mixed_layer(noise: np.random.Generator) -> None:
    from benchmarks.quality_networks import spatial_features

    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Mixed_6d = nn.Module()
            self.Mixed_6d.branch1x1 = nn.Module()
            self.Mixed_6d.branch1x1.conv = nn.Conv2d(3, 192, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.Mixed_6d.branch1x1.conv(images).mean(dim=(2, 3))

    net, images = Inception(), torch.from_numpy(noise.normal(size=(5, 3, 17, 17)).astype(np.float32))
    pooled, spatial = spatial_features(net, net, list(torch.split(images, 2)))
    assert pooled.shape == (5, 192)
    with torch.no_grad():
        expected = net.Mixed_6d.branch1x1.conv(images)[:, :7].flatten(1)
    # batches of other sizes may be summed in another order
    np.testing.assert_allclose(spatial, expected.double().numpy(), rtol=1e-5, atol=1e-6)
    assert spatial.shape == (5, 7 * 17 * 17)
    with pytest.raises(MissingDependencyError, match="sFID"):
        spatial_features(nn.Linear(1, 1), net, [images])


def test_prompts_and_real_pictures_are_read(tmp_path: Path) -> None:
    from benchmarks.quality_user import read_prompts, read_real_images, shown_names

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n  two \nthree\n", encoding="utf-8")
    assert read_prompts(prompts, None) == ("one", "two", "three")
    assert read_prompts(prompts, 2) == ("one", "two")
    prompts.write_text("one\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="has 1 prompts"):
        read_prompts(prompts, None)

    folder = tmp_path / "real"
    folder.mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / "wide.png")
    with pytest.raises(RecipeError, match="holds 1 pictures"):
        read_real_images(folder, (16, 16))
    Image.new("L", (16, 30), 0).save(folder / "grey.png")
    pictures = read_real_images(folder, (16, 16))
    assert pictures.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(pictures[0], np.full((3, 16, 16), -1))
    np.testing.assert_array_equal(pictures[1, 0], np.ones((16, 16)))
    assert shown_names(["w8a8", "x/w8a8.yaml", "FP"]) == ["w8a8", "w8a8-2", "FP-2"]


# --- the tool ---


def test_rows_are_listed_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_quality import cli

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["--list", "--json", "--group", "turbo"], catch_exceptions=False)
    assert result.exit_code == 0
    assert {row["model"] for row in json.loads(result.stdout)} == {"shapes-turbo"}
    assert "naive-w4a4" in CliRunner().invoke(cli, ["--list"], catch_exceptions=False).stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "w8a8"], "--recipe needs --model"),
        (["--model", "shapes", "--group", "baselines"], "--group does not go with --model"),
        (["--model", "shapes", "--recipe", "w8a8"], "--prompts FILE"),
    ],
)
def test_options_of_the_other_mode_are_refused(arguments: list[str], message: str) -> None:
    from bench_quality import cli

    with pytest.raises(RecipeError, match=message):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_prompts_of_the_calibration_are_kept_out() -> None:
    from benchmarks.quality_table import evaluation_prompts

    from qdexport.models.load import load_model
    from qdexport.models.sampling import prompts_for

    loaded = load_model("shapes-turbo")
    drawn = prompts_for(loaded, 50, 0)
    seen = set(drawn[5:15])
    prompts = evaluation_prompts(loaded, 50, seen)
    assert len(prompts) == 50
    assert not seen & set(prompts)
    assert [ours for ours, theirs in zip(prompts, drawn, strict=True) if theirs not in seen] == [
        prompt for prompt in drawn if prompt not in seen
    ]
    assert [len(prompt.split()) for prompt in prompts] == [len(prompt.split()) for prompt in drawn]
    assert evaluation_prompts(loaded, 50, set()) == tuple(drawn)


@pytest.mark.slow
def test_a_tiny_table_is_measured_documented_and_found_again(tmp_path: Path) -> None:
    rules = [{"match": "*", "weight": {"bits": 4}, "activation": {"bits": 8}}]
    recipe = {"rules": rules, "calibration": {"prompts": 2, "batch_size": 2, "steps": 2}}
    rows = [
        {"name": "fp", "group": "x", "model": "shapes-turbo", "images": 4},
        {"name": "q", "title": "W4A8", "group": "x", "model": "shapes-turbo", "recipe": "plain", "images": 4},
        {
            "name": "broken",
            "group": "x",
            "model": "shapes-turbo",
            "recipe": "plain",
            "set": {"rules.0.match": "no_such_layer"},
            "images": 4,
        },
    ]
    path = write_rows(
        tmp_path,
        recipes={"plain": recipe},
        rows=rows,
        comparisons=[{"row": "q", "against": "fp", "metrics": ["alignment"]}],
        pictures=["fp", "q"],
        traces=["q"],
    )
    common = ["--rows", str(path), "--batch-size", "2", "--steps", "2", "--real-images", "50", "--workers", "2"]
    first = run_tool(*common, "--write-docs", "--docs", str(tmp_path / "docs"), "--json", cwd=tmp_path)
    assert first.returncode == 1  # one row cannot be measured; the others are
    assert "no_such_layer" in first.stderr
    told = json.loads(first.stdout)
    assert list(told["rows"]) == ["fp", "q"]
    assert list(told["failed"]) == ["broken"]
    row = told["rows"]["q"]
    assert row["scores"]["mse"]["value"] > 0
    assert row["weight_bits"] == pytest.approx(4.0)
    assert [point["step"] for point in row["error_per_step"]] == [0, 1]
    assert row["error_per_step"][0]["mse"] == 0  # the same noise
    assert told["comparisons"][0]["differences"]["alignment"]["images"] == 4
    page = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "| W4A8 | 4.00 | 8.00 |" in page
    assert all(
        (tmp_path / "docs" / "pictures" / f"quality-{name}.png").is_file() for name in ("errors", "steps", "images")
    )

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / ".bench-quality").rglob("*.npz")}
    again = run_tool(*common, "--row", "q", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"]["q"]["scores"] == row["scores"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / ".bench-quality").rglob("*.npz")} == before


@pytest.mark.slow
def test_a_users_pipeline_is_measured_and_what_is_missing_is_said(tmp_path: Path) -> None:
    from qdexport.models.shapes import bundled_model_path

    (tmp_path / "prompts.txt").write_text("a red circle on a white background\n" * 2, encoding="utf-8")
    recipe = {
        "name": "mine",
        "rules": [{"match": "*", "weight": {"bits": 4}, "activation": {"bits": 8}}],
        "calibration": {"prompts": 2, "batch_size": 2, "steps": 2},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    folder = str(bundled_model_path("shapes-turbo"))
    arguments = ["--model", folder, "--prompts", "prompts.txt", "--recipe", "mine.yaml", "--steps", "2"]
    result = run_tool(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mine: done" in result.stderr
    assert "psnr_db" in result.stdout
    assert "FID, sFID to real images: not measured" in result.stdout
