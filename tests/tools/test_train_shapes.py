"""The tool that trains the shapes models: its parts, and one tiny run of every stage."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from qdexport.core.progress import SilentProgress
from qdexport.errors import ModelError
from qdexport.models.shapes import bundled_model_path
from qdexport.models.shapes_evaluator import ShapesEvaluator, load_evaluator

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_shapes.py"

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shapes_training.settings import FitSettings


@pytest.fixture(autouse=True, scope="module")
def tool_modules() -> Iterator[None]:
    """Makes `shapes_training` importable, as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_inside(*arguments: str) -> str:
    """Runs the tool in this process, which has loaded torch already; returns its standard output."""
    from train_shapes import cli

    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(cli, ["--threads", "1", *arguments], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.stdout


def tiny_settings() -> FitSettings:
    from shapes_training.settings import FitSettings

    return FitSettings(steps=6, batch=8, learning_rate=0.05, warmup=2, ema_decay=0.5, save_every=2)


def line_loss(module: nn.Module, step: int, source: torch.Generator) -> Tensor:
    """Least squares of y = 3 x - 1."""
    del step
    x = torch.randn(8, 1, generator=source)
    return (module(x) - (3 * x - 1)).square().mean()


def new_line() -> nn.Linear:
    line = nn.Linear(1, 1)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    return line


class TestFit:
    def test_learns_and_returns_a_frozen_average(self, tmp_path: Path) -> None:
        from shapes_training.fitting import fit

        settings = dataclasses.replace(tiny_settings(), steps=400, learning_rate=0.1, weight_decay=0.0)
        average = fit(new_line(), line_loss, settings, tmp_path / "line.safetensors", SilentProgress())
        # 400 Adam steps of a noiseless line: the remaining error is that of the last, small learning rate
        assert average.weight.item() == pytest.approx(3.0, abs=0.02)
        assert average.bias.item() == pytest.approx(-1.0, abs=0.02)
        assert not average.weight.requires_grad
        assert not average.training

    def test_interrupted_run_ends_like_an_uninterrupted_one(self, tmp_path: Path) -> None:
        from shapes_training.fitting import fit

        straight = fit(new_line(), line_loss, tiny_settings(), tmp_path / "a.safetensors", SilentProgress())

        def interrupted(module: nn.Module, step: int, source: torch.Generator) -> Tensor:
            if step == 5:
                raise KeyboardInterrupt
            return line_loss(module, step, source)

        file = tmp_path / "b.safetensors"
        with pytest.raises(KeyboardInterrupt):
            fit(new_line(), interrupted, tiny_settings(), file, SilentProgress())
        resumed = fit(new_line(), line_loss, tiny_settings(), file, SilentProgress())
        assert torch.equal(resumed.weight, straight.weight)
        assert torch.equal(resumed.bias, straight.bias)

    def test_finished_run_is_not_repeated(self, tmp_path: Path) -> None:
        from shapes_training.fitting import fit

        file = tmp_path / "line.safetensors"
        first = fit(new_line(), line_loss, tiny_settings(), file, SilentProgress())

        def never(module: nn.Module, step: int, source: torch.Generator) -> Tensor:
            raise AssertionError(step, module, source)

        again = fit(new_line(), never, tiny_settings(), file, SilentProgress())
        assert torch.equal(first.weight, again.weight)

    def test_foreign_checkpoints_are_refused(self, tmp_path: Path) -> None:
        from shapes_training.fitting import fit

        file = tmp_path / "line.safetensors"
        fit(new_line(), line_loss, tiny_settings(), file, SilentProgress())
        other = dataclasses.replace(tiny_settings(), seed=9)
        with pytest.raises(ModelError, match="other settings"):
            fit(new_line(), line_loss, other, file, SilentProgress())
        with pytest.raises(ModelError, match="another network"):
            fit(nn.Linear(2, 1), line_loss, tiny_settings(), file, SilentProgress())
        file.write_bytes(b"half a file")
        with pytest.raises(ModelError, match="damaged"):
            fit(new_line(), line_loss, tiny_settings(), file, SilentProgress())

    def test_divergence_is_an_error(self, tmp_path: Path) -> None:
        from shapes_training.fitting import fit

        def broken(module: nn.Module, step: int, source: torch.Generator) -> Tensor:
            return line_loss(module, step, source) * (torch.inf if step == 3 else 1.0)

        with pytest.raises(ModelError, match="inf at step 3; lower its learning rate"):
            fit(new_line(), broken, tiny_settings(), tmp_path / "line.safetensors", SilentProgress())


class TestNetworks:
    def test_tokenizer_is_that_of_the_bundled_model(self) -> None:
        from shapes_training.networks import build_tokenizer
        from transformers import CLIPTokenizer

        built, bundled = (
            build_tokenizer(),
            CLIPTokenizer.from_pretrained(bundled_model_path("shapes") / "tokenizer"),
        )
        assert built.get_vocab() == bundled.get_vocab()
        text = "a purple triangle right of a yellow cross on a brown background"
        assert built(text).input_ids == bundled(text).input_ids[: len(built(text).input_ids)]
        # BOS, one token a word, EOS
        assert len(built(text).input_ids) == len(text.split()) + 2

    @pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
    def test_configurations_are_those_of_the_bundled_model(self, part: str) -> None:
        from shapes_training import networks

        folder = bundled_model_path("shapes") / part
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        bundled = json.loads((folder / name).read_text())
        scale = {"scaling_factor": bundled["scaling_factor"]} if part == "vae" else {}
        built = getattr(networks, f"build_{part}")(**scale)
        assert json.loads(built.to_json_string()) == bundled


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline
    from shapes_training.base import draw_training_set
    from shapes_training.settings import BaseSettings

    pipeline = StableDiffusionPipeline.from_pretrained(bundled_model_path("shapes"), safety_checker=None)
    data = draw_training_set(64, 7, SilentProgress())
    return {"pipeline": pipeline, "data": data, "settings": BaseSettings.full(0)}


class TestLosses:
    """A loss that the finished networks do not satisfy would not have trained them."""

    def test_evaluator(self, parts: dict[str, Any]) -> None:
        from shapes_training.base import EvaluatorLoss

        loss = EvaluatorLoss(parts["data"], parts["settings"].evaluator)
        with torch.no_grad():
            finished = loss(load_evaluator(), 0, torch.Generator().manual_seed(0)).item()
            blank = loss(ShapesEvaluator(), 0, torch.Generator().manual_seed(0)).item()
        # four heads of three to five classes always count: ln 3 + 2 ln 4 + ln 5 = 5.5 when nothing is known
        assert finished < 0.01
        assert blank > 5.0

    def test_autoencoder(self, parts: dict[str, Any]) -> None:
        from shapes_training.base import VaeLoss
        from shapes_training.networks import build_vae

        loss = VaeLoss(parts["data"], parts["settings"].vae, parts["settings"].kl_weight)
        with torch.no_grad():
            finished = loss(parts["pipeline"].vae, 0, torch.Generator().manual_seed(0)).item()
            blank = loss(build_vae(), 0, torch.Generator().manual_seed(0)).item()
        # the bundled autoencoder leaves an L1 error of 0.036 in pictures from -1 to 1
        assert finished < 0.06
        assert blank > 0.5

    def test_denoiser(self, parts: dict[str, Any]) -> None:
        from shapes_training.base import Denoiser, DenoiserLoss, encode
        from shapes_training.networks import PROMPT_TOKENS

        pipeline, data = parts["pipeline"], parts["data"]
        latents = encode(pipeline.vae, data, SilentProgress()) * pipeline.vae.config.scaling_factor
        # the scaling factor was measured on another sample of the same distribution
        assert latents.std().item() == pytest.approx(1.0, abs=0.05)
        texts = [*data.texts, ""]
        ids = pipeline.tokenizer(
            texts, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
        ).input_ids
        loss = DenoiserLoss(latents, ids[:-1], ids[-1], parts["settings"])
        finished = Denoiser().requires_grad_(False)
        blank = loss(finished, 0, torch.Generator().manual_seed(0)).item()
        finished.unet, finished.text_encoder = pipeline.unet, pipeline.text_encoder
        with torch.no_grad():
            trained = loss(finished, 0, torch.Generator().manual_seed(0)).item()
        # epsilon has unit variance; an untrained network is no better than zero
        assert blank > 0.8
        assert trained < 0.15

    def test_layout_timesteps_come_late_and_often(self, parts: dict[str, Any]) -> None:
        from shapes_training.base import DenoiserLoss

        settings = parts["settings"]
        loss = DenoiserLoss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 16), torch.zeros(16), settings)
        source = torch.Generator().manual_seed(0)
        last = settings.denoiser.steps - 1
        early = torch.cat([loss.timesteps(0, source) for _ in range(100)])
        late = torch.cat([loss.timesteps(last, source) for _ in range(100)])
        # 4,800 draws: one standard deviation of the share is below 0.008, and the seed is fixed
        assert (early >= 500).float().mean().item() == pytest.approx(0.5, abs=0.03)
        assert (late >= 500).float().mean().item() == pytest.approx(0.75, abs=0.03)
        assert 0 <= int(early.min()) < 20
        assert 980 < int(late.max()) < 1000


class TestConsistency:
    def test_estimate_is_what_the_scheduler_computes(self) -> None:
        from shapes_training.networks import build_turbo_scheduler
        from shapes_training.trajectories import Consistency

        class Echo(nn.Module):
            """Predicts half of its input as noise."""

            def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> object:
                del time, text
                return type("Out", (), {"sample": 0.5 * latents})

        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        consistency = Consistency(build_turbo_scheduler(), 4)
        assert consistency.timesteps == [999, 759, 499, 259]
        for time in consistency.timesteps:
            scheduler = build_turbo_scheduler()
            scheduler.set_timesteps(4)
            expected = scheduler.step(0.5 * latents, time, latents).denoised
            got = consistency.clean(Echo(), latents, torch.full((3,), time), torch.zeros(3, 16, 64))
            # the same float32 formula; at 999 it divides by 0.07, which amplifies one rounding
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class TestSmallModels:
    @pytest.mark.parametrize(("kind", "edge"), [("classes", 16), ("velocity", 32)])
    def test_the_written_model_is_sampled(self, tmp_path: Path, kind: str, edge: int) -> None:
        from qdexport.models.conditions import class_labels
        from qdexport.models.load import load_model
        from qdexport.models.sampling import SampleRequest, prompts_for, sample

        run_inside("small", kind, str(tmp_path / kind), "--smoke")
        loaded = load_model(str(tmp_path / kind))
        pictures = sample(loaded, SampleRequest(prompts=tuple(prompts_for(loaded, 2, 0)), steps=2))
        assert pictures.shape == (2, 3, edge, edge)
        assert bool(torch.from_numpy(pictures).isfinite().all())
        wanted = {"classes": "epsilon", "velocity": "v_prediction"}[kind]
        assert loaded.scheduler is not None
        assert loaded.scheduler.config.prediction_type == wanted
        labels = class_labels(loaded.denoiser, range(200))
        assert (labels is None) == (kind == "velocity")
        if labels is not None:
            assert sorted(set(labels.tolist())) == list(range(20))

    def test_velocity_is_the_scheduler_s(self) -> None:
        from shapes_training.networks import build_scheduler
        from shapes_training.small import SmallSettings, VelocityLoss

        clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler = build_scheduler(prediction_type="v_prediction")

        class Knows(nn.Module):
            """Knows the clean latents, so that it can say which noise was added, or the velocity."""

            def __init__(self, kind: str) -> None:
                super().__init__()
                self.kind = kind

            def forward(self, noisy: Tensor, time: Tensor, text: Tensor) -> object:
                del text
                kept = scheduler.alphas_cumprod[time].reshape(-1, 1, 1, 1)
                noise = (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
                velocity = scheduler.get_velocity(clean.expand_as(noise), noise, time)
                return type("Out", (), {"sample": noise if self.kind == "noise" else velocity})

        table = type("Table", (), {"embeddings": torch.zeros(1, 16, 64), "empty": torch.zeros(16, 64)})()
        loss = VelocityLoss(Knows("noise"), clean, table, torch.zeros(1, dtype=torch.int64), SmallSettings.smoke(0))
        for step in range(4):
            source = torch.Generator().manual_seed(step)
            # float32: the division by the share of noise, 0.03 at least, and of signal, 0.07, amplifies 6e-8
            assert loss(Knows("velocity"), step, source).item() < 1e-8
            assert loss(Knows("noise"), step, source).item() > 1e-3


@pytest.mark.slow
def test_every_stage_runs_and_resumes(tmp_path: Path) -> None:
    base, turbo = tmp_path / "base", tmp_path / "turbo"
    run_inside("base", str(base), "--smoke")
    assert (base / "evaluator" / "model.safetensors").is_file()
    run_inside("distil", str(turbo), "--teacher", str(base), "--smoke")
    assert json.loads((turbo / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    for part in ("unet", "vae"):
        assert str(tmp_path) not in (turbo / part / "config.json").read_text()
    options = ("--steps", "2", "--guidance", "1", "--images", "4", "--real", "10")
    measured = run_inside("measure", str(turbo), *options)
    # random networks: nothing to say about the values but that they are there and in range
    result = json.loads(measured)
    assert 0.0 <= result["alignment"] <= result["attributes"] <= 1.0
    assert result["frechet"] >= 0.0

    damaged = tmp_path / "turbo.work" / "paths" / "from-noise" / "00000.safetensors"
    damaged.write_bytes(b"cut off")
    refused = run_tool("distil", str(turbo), "--teacher", str(base), "--smoke")
    assert refused.returncode == ModelError.exit_code
    assert "delete it" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_has_examples() -> None:
    for command in ("base", "distil", "small", "measure"):
        shown = run_tool(command, "--help")
        assert shown.returncode == 0
        assert f"\n    python tools/train_shapes.py {command} " in shown.stdout


def test_wrong_usage_ends_with_code_2() -> None:
    assert run_tool("distil").returncode == 2
    assert run_tool("measure", "no-such-folder").returncode == 2
