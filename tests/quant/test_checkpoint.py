"""Quantized checkpoints on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdexport.core.progress import SilentProgress
from qdexport.core.recipe import Recipe, load_recipe
from qdexport.core.target import TARGETS
from qdexport.errors import ModelError, OutputError
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec, shortcut_splits
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized
from qdexport.quant.attach import QuantizedModel, quantize_model
from qdexport.quant.calibrate import calibrate
from qdexport.quant.checkpoint import QUANTIZATION_FILE, RECIPE_FILE, load_quantized, save_quantized
from qdexport.quant.modules import ChannelScale, FirstToken, QuantSplitConv2d
from qdexport.quant.packing import integer_codes, unpack_codes
from qdexport.quant.plan import plan_layers
from qdexport.quant.ranges import given_ranges
from qdexport.quant.softmax import SoftmaxQuantizer

MakeRecipe = Callable[..., Recipe]


def _quantize(model: LoadedModel, recipe: Recipe, *, split: bool = False) -> QuantizedModel:
    splits = shortcut_splits(model.denoiser) if split else None
    plans = plan_layers(model.denoiser, recipe, splits=splits)
    ranges = given_ranges(plans, -4, 5) if model.pipeline is None else calibrate(model, plans, recipe)
    return quantize_model(model, plans, recipe, ranges)


@torch.no_grad()
def _predict(model: QuantizedModel, timestep: int) -> Tensor:
    inputs = example_inputs(io_spec(model.loaded, model.recipe.shapes, model.body), seed=0)
    return call_denoiser(model.denoiser, {**inputs, "timestep": torch.tensor([timestep])})


@pytest.mark.parametrize("rows", ["static", "per_step"])
@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_round_trip_is_exact(tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path, body: str, rows: str) -> None:
    activation = {"bits": 8, "symmetric": False, "signed": False}
    calibration = {"prompts": 2, "batch_size": 2, "steps": 2, "seed": 7}
    recipe = make_recipe(activation, body=body, activation_rows=rows, calibration=calibration)
    saved = _quantize(tiny, recipe, split=True)
    save_quantized(saved, tmp_path / "checkpoint")
    loaded = load_quantized(tmp_path / "checkpoint")
    assert loaded.plans == saved.plans
    assert loaded.recipe == recipe
    assert loaded.body == body
    assert loaded.timesteps == saved.timesteps
    assert loaded.rows == saved.rows == (2 if rows == "per_step" else 1)
    assert loaded.loaded.name == tiny.name
    assert loaded.loaded.defaults == tiny.defaults
    for timestep in (999, *saved.timesteps, 0):
        assert torch.equal(_predict(loaded, timestep), _predict(saved, timestep))


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_widths(make_recipe: MakeRecipe, tmp_path: Path, bits: int) -> None:
    base = loaded_from_denoiser(random_unet("tiny_unet2d"), name="tiny")
    weight = {"bits": bits, "observer": {"kind": "mse", "exponent": 2.0}}
    saved = _quantize(base, make_recipe({"bits": bits}, weight))
    save_quantized(saved, tmp_path / "checkpoint")
    loaded = load_quantized(tmp_path / "checkpoint")
    assert torch.equal(_predict(loaded, 500), _predict(saved, 500))
    plan = next(plan for plan in saved.plans if plan.name == "conv_in")
    assert plan.weight is not None
    stored = load_file(tmp_path / "checkpoint" / QUANTIZATION_FILE)["conv_in.weight_codes"].numpy()
    codes = integer_codes(saved.denoiser.get_submodule("conv_in"))
    assert np.array_equal(unpack_codes(stored, plan.weight, codes.shape), codes)
    assert stored.nbytes == (codes.size // 2 if bits <= 4 else codes.size)


def test_folder_is_a_diffusers_folder(tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    saved = _quantize(tiny, make_recipe(body="fp16", calibration={"prompts": 1, "steps": 1}))
    folder = tmp_path / "checkpoint"
    save_quantized(saved, folder)
    plain = load_model(folder)
    assert plain.weights_dtype == "fp16"
    for name, parameter in tiny.denoiser.named_parameters():
        assert torch.equal(plain.denoiser.get_parameter(name), parameter.half())
    assert load_recipe(str(folder / RECIPE_FILE)) == saved.recipe
    # the caller's pipeline still has its own denoiser
    assert tiny.pipeline is not None
    assert tiny.pipeline.unet is tiny.denoiser


def test_evaluator_goes_along(tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    evaluator = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, evaluator)
    model = replace(tiny, evaluator=evaluator)
    saved = _quantize(model, make_recipe(calibration={"prompts": 1, "steps": 1}))
    save_quantized(saved, tmp_path / "checkpoint")
    loaded = load_quantized(tmp_path / "checkpoint").loaded
    assert loaded.evaluator == tmp_path / "checkpoint" / "evaluator" / "model.safetensors"


@pytest.fixture
def checkpoint(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    base = loaded_from_denoiser(random_unet("tiny_unet2d"), name="tiny")
    save_quantized(_quantize(base, make_recipe()), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    path = folder / QUANTIZATION_FILE
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_documented_tensors(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / QUANTIZATION_FILE)
    assert tensors["conv_in.weight_codes"].dtype == torch.int8
    assert tensors["conv_in.weight_scale"].shape == (1, 16)
    assert tensors["conv_in.input_scale"].tolist() == [np.float32(5 / 127)]
    assert tensors["conv_in.input_zero_point"].tolist() == [0]
    with safe_open(checkpoint / QUANTIZATION_FILE, framework="pt") as file:
        facts = json.loads(file.metadata()["qdexport.quantization"])
    assert facts["version"] == 2
    assert facts["body"] == "fp32"
    assert facts["weights_in"] is None
    assert facts["plans"][0]["name"] == "conv_in"


def test_other_weights_are_noticed(checkpoint: Path) -> None:
    path = checkpoint / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"][0, 0] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer conv_out: \d+ of \d+ weight codes .* quantize them again"):
        load_quantized(checkpoint)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_cut_file(checkpoint: Path, keep: int) -> None:
    path = checkpoint / QUANTIZATION_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"quantization\.safetensors .*; quantize the model again"):
        load_quantized(checkpoint)


def _drop_codes(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["conv_in.weight_codes"]


def _drop_scale(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["conv_in.input_scale"]


def _negative_scale(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["conv_in.weight_scale"][0, 3] *= -1


def _many_rows(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    for name in ("conv_in.input_scale", "conv_in.input_zero_point"):
        tensors[name] = tensors[name].repeat(3)


def _short_codes(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["conv_in.weight_codes"] = tensors["conv_in.weight_codes"][:4].clone()


def _torn_group(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    name = next(name for name in tensors if name.endswith("to_k.input_scale"))
    tensors[name] = tensors[name] * 2


def _foreign(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata.clear()


def _newer(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["qdexport.quantization"] = json.dumps({"version": 99})


def _no_plans(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    facts = json.loads(metadata["qdexport.quantization"])
    del facts["plans"]
    metadata["qdexport.quantization"] = json.dumps(facts)


def _no_json(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["qdexport.quantization"] = "{"


def _other_layer(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["qdexport.quantization"] = metadata["qdexport.quantization"].replace('"conv_in"', '"conv_up"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_codes, r"has no tensor conv_in\.weight_codes"),
        (_drop_scale, r"has no tensor conv_in\.input_scale"),
        (_negative_scale, r"conv_in\.weight_scale holds a scale that is not a positive number"),
        (_many_rows, r"conv_in\.input_scale has \[3\] rows for 0 steps"),
        (_short_codes, r"conv_in\.weight_codes does not fit its layer: int8 \[4, 3, 3, 3\], expected"),
        (_torn_group, "have different input scales"),
        (_foreign, "was not written by qdexport"),
        (_newer, "has format 99, this qdexport reads 2"),
        (_no_plans, "has wrong metadata"),
        (_no_json, "has wrong metadata"),
        (_other_layer, r"has no tensor conv_up\.|has no layer conv_up"),
    ],
)
def test_damaged_contents(
    checkpoint: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str
) -> None:
    _rewrite(checkpoint, change)
    with pytest.raises(ModelError, match=message):
        load_quantized(checkpoint)


def test_missing_files(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / RECIPE_FILE).unlink()
    with pytest.raises(ModelError, match=r"recipe\.yaml is missing"):
        load_quantized(checkpoint)
    with pytest.raises(ModelError, match=r"is no quantized checkpoint: quantization\.safetensors is missing"):
        load_quantized(tmp_path)


def test_without_weights(tiny: LoadedModel, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    saved = _quantize(tiny, make_recipe(body="fp16", calibration={"prompts": 1, "steps": 1}))
    folder = tmp_path / "checkpoint"
    save_quantized(saved, folder, with_weights=False)
    assert {path.name for path in folder.iterdir()} == {QUANTIZATION_FILE, RECIPE_FILE}
    assert torch.equal(_predict(load_quantized(folder), 500), _predict(saved, 500))


def test_without_weights_in_memory_or_gone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = loaded_from_denoiser(random_unet("tiny_unet2d"), name="tiny")
    saved = _quantize(base, make_recipe())
    save_quantized(saved, tmp_path / "memory", with_weights=False)
    with pytest.raises(ModelError, match="tiny was made in memory; give the model to load_quantized"):
        load_quantized(tmp_path / "memory")
    loaded = load_quantized(tmp_path / "memory", loaded=base)
    assert torch.equal(_predict(loaded, 500), _predict(saved, 500))
    other = loaded_from_denoiser(random_unet("tiny_unet2d", seed=1), name="tiny")
    with pytest.raises(ModelError, match="are not those of the loaded weights"):
        load_quantized(tmp_path / "memory", loaded=other)

    moved = replace(saved, loaded=replace(base, folder=tmp_path / "moved"))
    save_quantized(moved, tmp_path / "gone", with_weights=False)
    with pytest.raises(ModelError, match="moved, which is gone"):
        load_quantized(tmp_path / "gone")


def test_earlier_checkpoint_is_replaced_and_nothing_else(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = loaded_from_denoiser(random_unet("tiny_unet2d"), name="tiny")
    saved = _quantize(base, make_recipe())
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "diary.txt").write_text("precious")
    with pytest.raises(OutputError, match="is not empty and no quantized checkpoint"):
        save_quantized(saved, folder)
    assert (folder / "diary.txt").read_text() == "precious"
    (folder / "diary.txt").unlink()
    save_quantized(saved, folder)
    (folder / "stale.bin").write_bytes(b"")
    save_quantized(load_quantized(folder), folder)  # over the files it was read from
    assert not (folder / "stale.bin").exists()
    assert torch.equal(_predict(load_quantized(folder), 500), _predict(saved, 500))


# every mechanism at once

MECHANISMS = {
    "activation_rows": {"method": "uniform", "count": 2},
    "split_shortcuts": True,
    "bos": "constant",
    "channel_scale": {"kinds": ["conv", "linear"], "groups": 2, "choose_ratio": False},
    "softmax": {"bits": 4},
    "calibration": {"prompts": 1, "batch_size": 1, "steps": 3, "guidance_scale": 3.0, "seed": 7},
}


@pytest.fixture(scope="module")
def everything(tiny: LoadedModel) -> QuantizedModel:
    rule = {
        "match": "*",
        "weight": {"bits": 4, "granularity": "per_channel"},
        "activation": {"bits": 8, "symmetric": False, "signed": False},
    }
    recipe = Recipe.model_validate({"name": "everything", "rules": [rule], **MECHANISMS})
    settings = QuantizeSettings(target=TARGETS["tensorrt-rtx"])
    return make_quantized(tiny, recipe, settings, SilentProgress())


@pytest.fixture(scope="module")
def saved_everything(everything: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything") / "checkpoint"
    save_quantized(everything, folder, with_weights=False)
    return folder


def test_round_trip_of_every_mechanism_is_exact(everything: QuantizedModel, tmp_path: Path) -> None:
    save_quantized(everything, tmp_path / "checkpoint")
    loaded = load_quantized(tmp_path / "checkpoint")
    assert loaded.plans == everything.plans
    assert loaded.recipe == everything.recipe
    assert loaded.timesteps == everything.timesteps
    assert loaded.rows == everything.rows == 3
    assert loaded.bos is not None
    assert everything.bos is not None
    assert torch.equal(loaded.bos.embedding, everything.bos.embedding)
    for timestep in (999, *everything.timesteps, 0):
        assert torch.equal(_predict(loaded, timestep), _predict(everything, timestep))
    for first, second in zip(loaded.denoiser.modules(), everything.denoiser.modules(), strict=True):
        assert type(first) is type(second)
        for name, buffer in second.named_buffers(recurse=False):
            assert torch.equal(first.get_buffer(name), buffer), (type(first).__name__, name)


def test_the_round_trip_had_everything_to_carry(everything: QuantizedModel) -> None:
    modules = list(everything.denoiser.modules())
    assert any(isinstance(module, QuantSplitConv2d) for module in modules)
    assert any(isinstance(module, FirstToken) for module in modules)
    assert any(isinstance(module, ChannelScale) and module.ratio.max() > 1 for module in modules)
    assert any(isinstance(module, SoftmaxQuantizer) for module in modules)
    split_and_scaled = [plan for plan in everything.plans if plan.splits and plan.channel_scale]
    assert split_and_scaled


def test_documented_tensors_of_mechanisms(saved_everything: Path, everything: QuantizedModel) -> None:
    tensors = load_file(saved_everything / QUANTIZATION_FILE)
    assert tensors["conv_in.channel_ratio"].shape == (4,)
    assert tensors["bos.embedding"].shape == (16,)
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert tensors[f"{block}.softmax_scale"].shape in ((1,), (3,))
    assert set(tensors[f"{block}.softmax_mode"].tolist()) <= {0.0, 1.0}
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if not name.endswith("_codes"))
    with safe_open(saved_everything / QUANTIZATION_FILE, framework="pt") as file:
        facts = json.loads(file.metadata()["qdexport.quantization"])
    assert everything.bos is not None
    assert facts["encoder"] == everything.bos.encoder
    assert facts["softmax_bits"][block] == 4
    # one vector of ratios for all layers that read one tensor
    groups = {plan.group for plan in everything.plans if plan.quantized}
    assert {name.removesuffix(".channel_ratio") for name in tensors if name.endswith(".channel_ratio")} == groups


BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"


def _no_ratio(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["conv_in.channel_ratio"]


def _short_ratio(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["conv_in.channel_ratio"] = tensors["conv_in.channel_ratio"][:3].clone()


def _zero_ratio(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["conv_in.channel_ratio"][1] = 0


def _no_embedding(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["bos.embedding"]


def _broken_embedding(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["bos.embedding"][2] = torch.nan


def _no_encoder(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    facts = json.loads(metadata["qdexport.quantization"])
    metadata["qdexport.quantization"] = json.dumps({**facts, "encoder": None})


def _no_softmax_scale(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors[f"{BLOCK}.softmax_scale"]


def _no_softmax_mode(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors[f"{BLOCK}.softmax_mode"]


def _softmax_rows(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors[f"{BLOCK}.softmax_scale"] = torch.ones(2)
    tensors[f"{BLOCK}.softmax_mode"] = torch.ones(2)


def _softmax_lengths(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors[f"{BLOCK}.softmax_scale"] = torch.ones(3)
    tensors[f"{BLOCK}.softmax_mode"] = torch.ones(1)


def _softmax_third_mode(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors[f"{BLOCK}.softmax_mode"] += 2


def _softmax_elsewhere(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["qdexport.quantization"] = metadata["qdexport.quantization"].replace(f'"{BLOCK}":', '"mid_block.attn9":')
    for name in ("softmax_scale", "softmax_mode"):
        tensors[f"mid_block.attn9.{name}"] = tensors.pop(f"{BLOCK}.{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_ratio, r"has no tensor conv_in\.channel_ratio"),
        (_short_ratio, r"channel ratios of conv_in have shape \[3\], and layer conv_in has 4 input channels"),
        (_zero_ratio, r"conv_in\.channel_ratio holds a scale that is not a positive number"),
        (_no_embedding, r"has no tensor bos\.embedding"),
        (_broken_embedding, r"bos\.embedding holds NaN or infinity"),
        (_no_encoder, r"leaves the text's first token out, .*embedding"),
        (_no_softmax_scale, r"has no tensor mid_block\S+\.softmax_scale"),
        (_no_softmax_mode, r"has no tensor mid_block\S+\.softmax_mode"),
        (_softmax_rows, r"attn1\.softmax_scale has \[2\] rows for 3 steps"),
        (_softmax_lengths, r"attn1\.softmax_scale has \[3\] rows and softmax_mode \[1\]"),
        (_softmax_third_mode, r"attn1\.softmax_mode holds .* neither 0 .* nor 1"),
        (_softmax_elsewhere, r"the denoiser has no attention block mid_block\.attn9"),
    ],
)
def test_damaged_mechanisms(
    saved_everything: Path,
    tiny: LoadedModel,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
    message: str,
) -> None:
    shutil.copytree(saved_everything, tmp_path / "checkpoint")
    _rewrite(tmp_path / "checkpoint", change)
    with pytest.raises(ModelError, match=message):
        load_quantized(tmp_path / "checkpoint", loaded=tiny)


def test_changed_weights_are_noticed_behind_channel_scales(
    saved_everything: Path, tiny: LoadedModel, tmp_path: Path
) -> None:
    shutil.copytree(saved_everything, tmp_path / "checkpoint")

    def scaled(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["conv_in.channel_ratio"] = tensors["conv_in.channel_ratio"].flip(0) * 2

    _rewrite(tmp_path / "checkpoint", scaled)
    with pytest.raises(ModelError, match=r"layer conv_in: \d+ of \d+ weight codes"):
        load_quantized(tmp_path / "checkpoint", loaded=tiny)
