"""Every bad input gets one message, its documented exit code, and leaves no half-written artefact."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdexport.core.recipe import preset_text
from tests.pipeline.conftest import SMALL

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def own_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(result, code: int, *texts: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.output


def test_a_missing_folder(qdexport, tmp_path):
    out = tmp_path / "out"
    refused(qdexport("compile", tmp_path / "nowhere", "--out", out), 3, "nowhere")
    assert not (out / "checkpoint").exists()


def test_a_missing_component(qdexport, own_folder, tmp_path):
    shutil.rmtree(own_folder / "vae")
    refused(qdexport("compile", own_folder, "--out", tmp_path / "out", *SMALL), 3, "vae")


def test_truncated_weights(qdexport, own_folder, tmp_path):
    path = own_folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(qdexport("compile", own_folder, "--out", tmp_path / "out", *SMALL), 3, path.name)


def test_nan_weights(qdexport, own_folder, tmp_path):
    tensors = load_file(own_folder / WEIGHTS)
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, own_folder / WEIGHTS)
    refused(qdexport("compile", own_folder, "--out", tmp_path / "out", *SMALL), 3, "conv_in.weight")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_an_unknown_recipe_key_with_a_suggestion(qdexport, tiny_folder, tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text(preset_text("w8a8").replace("activation_rows", "activation_row"))
    result = qdexport("compile", tiny_folder, "--recipe", recipe, "--out", tmp_path / "out")
    refused(result, 2, "my.yaml:", "unknown key 'activation_row'", "did you mean 'activation_rows'")


def test_a_rule_without_a_match(qdexport, tiny_folder, tmp_path):
    recipe = tmp_path / "my.yaml"
    rule = '  - match: "down_block.*"\n    weight: {bits: 4, granularity: per_channel}\n    activation: {bits: 8}\n'
    recipe.write_text(preset_text("w8a8").replace("activation_rows:", rule + "activation_rows:"))
    refused(qdexport("compile", tiny_folder, "--recipe", recipe, "--out", tmp_path / "out"), 2, "down_block.*")


def test_a_compute_capability_that_the_target_lacks(qdexport, tiny_folder, tmp_path):
    result = qdexport("compile", tiny_folder, "--out", tmp_path / "out", "--set", "compute_capabilities=['9.0']")
    refused(result, 2, "9.0", "tensorrt")


def test_a_target_without_its_builder(qdexport, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(qdexport("compile", tiny_folder, "--out", tmp_path / "out"), 9, "pip install")


def test_a_read_only_output_folder(qdexport, tiny_folder, tmp_path, monkeypatch):
    def denied(*_: object, **__: object) -> None:  # root may write anywhere, so the kernel's answer is played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("qdexport.core.files.tempfile.mkdtemp", denied)
    result = qdexport("quantize", tiny_folder, "--out", tmp_path / "out", *SMALL)
    refused(result, 10, "permission denied", "choose another output folder")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_an_output_path_below_a_file(qdexport, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    refused(qdexport("compile", tiny_folder, "--out", tmp_path / "file" / "out", *SMALL), 10, "cannot write")


def test_a_full_output_folder(qdexport, tiny_folder, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdexport.quant.checkpoint.write_safetensors", full)
    out = tmp_path / "out"
    refused(qdexport("quantize", tiny_folder, "--out", out, *SMALL), 10, "No space left on device", "free some space")
    assert not (out / "checkpoint").exists()
    assert [item.name for item in out.iterdir() if not item.name.startswith(".")] == []


def test_a_folder_with_other_files_is_not_taken(qdexport, tiny_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    refused(qdexport("compile", tiny_folder, "--out", tmp_path, *SMALL), 10, "thesis.tex")


def test_an_onnx_file_from_elsewhere(qdexport, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no protobuf message at all")
    refused(qdexport("inspect", path), 3, "model.onnx")


def test_an_assignment_without_a_value(qdexport, tiny_folder, tmp_path):
    refused(qdexport("compile", tiny_folder, "--out", tmp_path / "out", "--set", "body"), 2, "KEY=VALUE")


def test_interrupted_calibration_continues(qdexport, tiny_folder, tmp_path, monkeypatch):
    """Ctrl-C in the second batch: the first is kept, and the result equals an uninterrupted run bit for bit."""
    small = (*SMALL, "--set", "calibration.batch_size=1")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert qdexport("quantize", tiny_folder, "--out", straight, *small).exit_code == 0

    import qdexport.pipeline.quantize as stage

    original, calls = stage.observe, []

    def interrupting(loaded, plans, recipe, *, state_dir, on_progress):
        def stop(done: int, total: int) -> None:
            calls.append(done)
            if done == 5:
                raise KeyboardInterrupt
            on_progress(done, total)

        return original(loaded, plans, recipe, state_dir=state_dir, on_progress=stop)

    monkeypatch.setattr(stage, "observe", interrupting)
    assert qdexport("quantize", tiny_folder, "--out", resumed, *small).exit_code == 1  # click's Abort in a test runner
    assert not (resumed / "checkpoint").exists()
    calls.clear()
    monkeypatch.setattr(stage, "observe", original)
    assert qdexport("quantize", tiny_folder, "--out", resumed, *small).exit_code == 0
    codes = [load_file(folder / "checkpoint" / "quantization.safetensors") for folder in (straight, resumed)]
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
