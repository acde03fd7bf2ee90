"""The networks beside the denoiser through the command line: stages, artefacts, report, bad input."""

from __future__ import annotations

import json
import shutil

import pytest

from qdexport.core.recipe import Companions
from qdexport.core.results import Manifest, Plan, Report
from qdexport.errors import CaptureError
from qdexport.models.companions import find_companions
from qdexport.models.load import load_model
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline
from qdexport.pipeline import companions
from qdexport.pipeline.sampling import open_denoisers
from tests.pipeline.conftest import SMALL

NAMES = ("text_encoder", "vae_decoder")


@pytest.fixture
def copy(compiled, tmp_path):
    return shutil.copytree(compiled, tmp_path / "out")


@pytest.mark.rtx
def test_each_network_has_its_file_engine_and_plan(compiled):
    """All weighted layers and the attention of the two FP16 networks compute in FP16; no stray FP32 product."""
    report = Report.load(compiled / "report.json")
    assert report.companions is not None
    assert tuple(report.companions) == NAMES
    for name, result in report.companions.items():
        plan = Plan.load(compiled / name / "engine" / "plan.json")
        assert (result.body, result.mismatches) == ("fp16", [])
        assert result.layers["onnx"] == result.layers["planned"]
        assert set(result.layers["engine"]) == {"fp16"}
        assert result.engine is not None
        assert result.engine.kernels == len([item for item in plan.kernels if item.kind not in {"signal", "wait"}])
        assert (result.engine.int8_compute, result.engine.fp_compute > 0) == (0, True)
        assert result.engine.attention_kernels >= 1  # two layers of text; the middle of the decoder
        assert result.parity is not None
        assert result.parity.verdict == "pass"
        assert len(list((compiled / name / "golden").glob("*.npz"))) >= 1
    assert report.whole_pipeline is not None
    assert report.whole_pipeline.verdict == "pass"
    kinds = [item.kind for item in Manifest.load(compiled / "manifest.json").artifacts]
    assert [kinds.count(f"companion_{kind}") for kind in ("onnx", "engine", "plan", "golden")] == [2, 2, 2, 2]
    page = (compiled / "report.html").read_text(encoding="utf-8")
    assert 'id="companions"' in page
    assert "AutoencoderKL" in page


@pytest.mark.rtx
def test_a_network_that_is_no_longer_asked_for_is_removed(copy, qdexport, tiny_folder):
    arguments = ("--recipe", "w8a8-timestep", "--companions", "text_encoder", "--out", copy, *SMALL)
    assert qdexport("quantize", tiny_folder, *arguments).exit_code == 0
    result = qdexport("export", copy, "--json")
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)["stages"]
    assert "export:text_encoder" in stages
    assert "export:vae_decoder" not in stages
    assert not (copy / "vae_decoder").exists()
    manifest = Manifest.load(copy / "manifest.json")
    assert not [item.path for item in manifest.artifacts if item.path.startswith("vae_decoder")]
    assert list(json.loads(result.stdout)["companions"]) == ["text_encoder"]


@pytest.mark.rtx
@pytest.mark.parametrize("file", ["onnx/model.onnx", "engine/model.engine", "engine/plan.json"])
def test_a_damaged_file_of_a_network_stops_the_validation(copy, qdexport, file):
    """What it was compared with is gone: nothing is said about it."""
    path = copy / "vae_decoder" / file
    path.write_bytes(b"" if file.endswith("engine") else path.read_bytes()[:-1] + b"?")
    refused(qdexport("validate", copy), 10, f"vae_decoder/{file} was changed", "qdexport ")
    refused(qdexport("inspect", copy), 10, f"vae_decoder/{file} was changed")


@pytest.mark.rtx
def test_networks_that_a_new_recipe_leaves_as_they_are_stay(copy, qdexport, tiny_folder):
    """Their engines are kept; what was compared with the old denoiser's pictures is not."""
    arguments = ("--recipe", "w8a8-asym", "--out", copy, *SMALL)
    assert qdexport("quantize", tiny_folder, *arguments).exit_code == 0
    report = Report.load(copy / "report.json")
    assert (report.parity, report.engine, report.coverage, report.quality) == (None, None, None, None)
    assert report.whole_pipeline is None
    assert report.companions is not None
    assert [(item.engine is None, item.parity) for item in report.companions.values()] == [(False, None)] * 2
    assert set(report.stages) == {"quantize", *(f"{kind}:{name}" for kind in ("export", "build") for name in NAMES)}
    assert not list(copy.glob("*/golden")) + list(copy.glob("engine")) + list(copy.glob("images"))
    assert (copy / "vae_decoder" / "engine" / "model.engine").is_file()


@pytest.mark.rtx
def test_a_damaged_engine_is_built_again(copy, qdexport):
    (copy / "vae_decoder" / "engine" / "model.engine").write_bytes(b"damaged")
    result = qdexport("build", copy, "--json")
    assert result.exit_code == 0, result.output
    cached = {name: stage["cached"] for name, stage in json.loads(result.stdout)["stages"].items()}
    assert (cached["build:text_encoder"], cached["build:vae_decoder"], cached["build"]) == (True, False, True)
    assert (copy / "vae_decoder" / "engine" / "model.engine").stat().st_size > 1000


@pytest.mark.rtx
def test_sampling_runs_the_compiled_networks(compiled):
    opened = open_denoisers(str(compiled), ("onnx",))
    assert tuple(opened.companions) == NAMES


@pytest.mark.rtx
def test_inspecting_a_network(compiled, qdexport):
    facts = json.loads(qdexport("inspect", compiled / "vae_decoder" / "onnx" / "model.onnx", "--json").stdout)
    assert (facts["network"], facts["scaling_factor"]) == ("vae_decoder", 0.18215)
    assert facts["inputs"] == {"latents": "FLOAT[1,4,8,8]"}
    assert facts["outputs"] == {"image": "FLOAT[1,3,16,16]"}


def refused(result, code, *texts):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.output


def test_a_network_that_is_not_there_is_refused_before_anything_is_made(qdexport, tiny_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("compile", tiny_folder, "--out", out, *SMALL)
    refused(qdexport(*arguments, "--companions", "text_encoder_2"), 3, "has no text_encoder_2", "remove it")
    assert not (out / "checkpoint").exists()
    assert not (out / "text_encoder_2").exists()
    refused(qdexport(*arguments, "--companions", "vae"), 2, "companions.networks")


def test_damaged_weights_of_a_network(qdexport, tiny_folder, tmp_path):
    """Files are checked when the model is loaded; a pickle that holds more than tensors is not executed."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(qdexport("compile", folder, "--out", tmp_path / "out", *SMALL), 3, path.name, "truncated")
    path.unlink()
    pickle = path.with_suffix(".bin")
    pickle.write_bytes(b"cos\nsystem\n(S'touch /nowhere/at/all'\ntR.")
    refused(qdexport("compile", folder, "--out", tmp_path / "out", *SMALL), 3, pickle.name, "convert it to safetensors")
    assert not [item for item in (tmp_path / "out").iterdir() if not item.name.startswith(".")]


@pytest.mark.rtx
def test_a_network_that_cannot_be_captured_names_the_way_out(copy, qdexport, monkeypatch):
    def fails(*_: object) -> None:
        raise CaptureError("torch.export cannot trace it")

    monkeypatch.setattr(companions, "capture_network", fails)
    (copy / "text_encoder" / "onnx" / "model.onnx").unlink()
    result = qdexport("export", copy)
    refused(result, 4, "text_encoder: torch.export cannot trace it", "--companions none compiles the denoiser alone")
    assert list((copy / "text_encoder" / "onnx").iterdir()) == []


def test_a_model_that_is_not_sampled_has_no_networks(tiny_folder):
    assert find_companions(load_model(tiny_folder / "unet"), Companions()).names == ()


@pytest.mark.rtx
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_whole_pipelines_of_transformers(family, tmp_path, qdexport):
    """CLIP, T5 and the VAE beside the denoiser; T5 keeps two layers in FP32. FLUX packs its latents to tokens."""
    folder = save_tiny_pipeline(tmp_path / family, family, TinyOptions(text_encoders=True))
    sizes = ("--set", "shapes.height=8", "--set", "shapes.width=8", "--set", "shapes.tokens=96")
    result = qdexport("compile", folder, "--recipe", "w8a8", "--out", tmp_path / "out", "--json", *SMALL, *sizes)
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.companions is not None
    encoders = {"pixart": 1, "flux": 2, "sd3": 3}[family]
    assert tuple(report.companions) == (*NAMES[:1], "text_encoder_2", "text_encoder_3")[:encoders] + NAMES[1:]
    assert all(item.parity.verdict == "pass" and item.mismatches == [] for item in report.companions.values())
    t5 = list(report.companions.values())[encoders - 1]
    assert (t5.class_name, t5.layers["engine"]) == ("T5EncoderModel", {"fp16": 12, "fp32": 2})
    assert report.whole_pipeline.verdict == "pass"
    assert report.whole_pipeline.networks == ["denoiser", *report.companions]


def test_a_pipeline_that_does_not_say_the_size_of_its_pictures(tmp_path, qdexport):
    """DiT's has no `vae_scale_factor`: the decoder's own configuration says it."""
    folder = save_tiny_pipeline(tmp_path / "dit", "dit")
    out = tmp_path / "out"
    result = qdexport("compile", folder, "--recipe", "w8a8", "--target", "onnxruntime", "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "out" / "report.json")
    assert tuple(report.companions) == ("vae_decoder",)
    assert report.whole_pipeline.verdict == "pass"
