from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdexport.errors import ModelError
from qdexport.models.load import load_model, loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
Copy = Callable[..., Path]


def _edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("family", "pipeline", "denoiser"),
    [
        ("sd", "StableDiffusionPipeline", "UNet2DConditionModel"),
        ("sdxl", "StableDiffusionXLPipeline", "UNet2DConditionModel"),
        ("unet2d", "DDIMPipeline", "UNet2DModel"),
    ],
)
def test_pipelines_load_without_a_word(
    family: str,
    pipeline: str,
    denoiser: str,
    tiny_folders: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded = load_model(str(tiny_folders[family]))
    assert type(loaded.pipeline).__name__ == pipeline
    assert type(loaded.denoiser).__name__ == denoiser
    assert loaded.pipeline is not None
    assert loaded.pipeline.unet is loaded.denoiser
    assert loaded.scheduler is loaded.pipeline.scheduler
    assert (loaded.name, loaded.component, loaded.weights_dtype) == (family, "unet", "fp32")
    assert not loaded.denoiser.training
    assert loaded.evaluator is None
    assert capfd.readouterr() == ("", "")


def test_bundled_model() -> None:
    loaded = load_model("shapes")
    assert loaded.name == "shapes"
    assert loaded.evaluator is not None
    defaults = loaded.defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.height, defaults.cfg) == (25, 4.0, 8, True)
    assert sum(p.numel() for p in loaded.denoiser.parameters()) == 2_765_540


@pytest.mark.parametrize(
    ("family", "steps", "guidance_scale", "cfg"),
    [("sd", 25, 7.5, True), ("sdxl", 25, 5.0, True), ("unet2d", 50, 1.0, False)],
)
def test_defaults(
    family: str, steps: int, guidance_scale: float, cfg: bool, tiny_folders: dict[str, Path]
) -> None:
    defaults = load_model(tiny_folders[family]).defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.cfg) == (steps, guidance_scale, cfg)
    assert (defaults.height, defaults.width) == (8, 8)


def test_defaults_of_a_consistency_model(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "lcm", "sd", TinyOptions(scheduler="LCMScheduler"))
    defaults = load_model(folder).defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.cfg) == (4, 1.0, False)


def test_bundled_turbo_model() -> None:
    loaded = load_model("shapes-turbo")
    assert loaded.evaluator is not None
    assert (loaded.defaults.steps, loaded.defaults.guidance_scale, loaded.defaults.cfg) == (4, 1.0, False)


def test_component_alone(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"] / "unet")
    assert (loaded.pipeline, loaded.scheduler) == (None, None)
    assert loaded.name == "unet"
    assert loaded.defaults.cfg


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_stored_type_is_kept(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    folder = save_tiny_pipeline(tmp_path / name, "sd", TinyOptions(dtype=dtype))
    loaded = load_model(folder)
    assert loaded.weights_dtype == loaded.stored_dtype == name
    assert {p.dtype for p in loaded.denoiser.parameters()} == {dtype}
    assert loaded.pipeline is not None
    assert loaded.pipeline.text_encoder.dtype == loaded.pipeline.vae.dtype == dtype


@pytest.mark.parametrize("asked", ["fp16", torch.float16])
def test_type_on_request(asked: Any, tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"], torch_dtype=asked)
    assert (loaded.weights_dtype, loaded.stored_dtype) == ("fp16", "fp32")
    stored = load_file(tiny_folders["sd"] / UNET_FILE)["conv_in.weight"]
    assert torch.equal(loaded.denoiser.get_parameter("conv_in.weight"), stored.half())


def test_float8_checkpoint_needs_a_conversion(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(folder / UNET_FILE).items()}
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="stored as F8_E4M3, not as fp32, fp16 or bf16; give torch_dtype"):
        load_model(folder)
    loaded = load_model(folder, torch_dtype="fp32")
    assert (loaded.weights_dtype, loaded.stored_dtype) == ("fp32", None)
    assert torch.equal(loaded.denoiser.get_parameter("conv_in.weight"), tensors["conv_in.weight"].float())


@pytest.mark.parametrize("asked", ["int8", torch.float64])
def test_unknown_type(asked: Any, tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"unknown torch_dtype .*; use fp32, fp16, bf16"):
        load_model(tiny_folders["sd"], torch_dtype=asked)


def test_variant(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", "sd", TinyOptions(dtype=torch.float16, variant="fp16"))
    assert load_model(folder, variant="fp16").weights_dtype == "fp16"
    with pytest.raises(ModelError, match="variants there: fp16; give variant='fp16'"):
        load_model(folder)
    with pytest.raises(ModelError, match="no weights of variant 'ema'"):
        load_model(folder, variant="ema")


def test_variant_of_the_denoiser_alone(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    plain = folder / UNET_FILE
    plain.rename(plain.with_name("diffusion_pytorch_model.ema.safetensors"))
    loaded = load_model(folder, variant="ema")  # the other components have plain weights only
    assert loaded.pipeline is not None


def test_sharded(tmp_path: Path, tiny_models: dict[str, Any]) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", "sd", TinyOptions(max_shard_size="200KB"))
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    loaded = load_model(folder)
    for name, weight in tiny_models["sd"].denoiser.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], weight)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name} is not there"):
        load_model(folder)


def test_pickled(tmp_path: Path, tiny_models: dict[str, Any]) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", "unet2d", TinyOptions(pickled=True))
    assert (folder / "unet/diffusion_pytorch_model.bin").is_file()
    weight = load_model(folder).denoiser.get_parameter("conv_in.weight")
    assert torch.equal(weight, tiny_models["unet2d"].denoiser.get_parameter("conv_in.weight"))


def test_pickled_text_encoder_among_safetensors(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    file = folder / "text_encoder/model.safetensors"
    state = load_file(file)
    torch.save(state, file.with_name("pytorch_model.bin"))
    file.unlink()
    loaded = load_model(folder)
    assert loaded.pipeline is not None
    name, weight = next(iter(state.items()))
    assert torch.equal(loaded.pipeline.text_encoder.state_dict()[name], weight)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_missing_component(part: str, tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(
        ModelError, match=rf"model_index.json lists the component '{part}', but there is no folder"
    ):
        load_model(folder)


def test_empty_component_folder(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"component folder .*scheduler is empty"):
        load_model(folder)


@pytest.mark.parametrize(
    "file", [UNET_FILE, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
class TestBrokenWeights:
    def test_missing(self, file: str, tiny_copy: Copy) -> None:
        folder = tiny_copy()
        (folder / file).unlink()
        with pytest.raises(ModelError, match=f"no weights in .*{Path(file).parent}"):
            load_model(folder)

    def test_truncated(self, file: str, tiny_copy: Copy) -> None:
        folder = tiny_copy()
        path = folder / file
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ModelError, match=f"{file} is truncated"):
            load_model(folder)

    def test_not_finite(self, file: str, tiny_copy: Copy) -> None:
        folder = tiny_copy()
        tensors = load_file(folder / file)
        name = max(tensors)
        tensors[name].view(-1)[0] = torch.nan
        save_file(tensors, folder / file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{file}: tensor '{name}' holds nan"):
            load_model(folder)


def test_weights_that_do_not_fit_the_config(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    tensors = load_file(folder / UNET_FILE)
    bias = tensors.pop("conv_in.bias")
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of the config, for instance 'conv_in\.bias'"):
        load_model(folder)
    save_file({**tensors, "conv_in.bias": bias[:-1].clone()}, folder / UNET_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"diffusers cannot load .*unet.*conv_in.bias"):
        load_model(folder)


def test_weights_without_a_place_are_mentioned(tiny_copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_copy()
    tensors = {**load_file(folder / UNET_FILE), "extra": torch.ones(1)}
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert "1 tensors have no place in the model, e.g. extra" in caplog.text


def test_component_of_another_kind(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(
        ModelError, match=r"vae/config.json: 'AutoencoderKL' .*supported: UNet2DCond.*, UNet2DModel"
    ):
        load_model(tiny_folders["sd"] / "vae")
    with pytest.raises(ModelError, match=r"config\.json names no diffusers class"):
        load_model(tiny_folders["sd"] / "text_encoder")


def test_pipeline_with_a_transformer(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    _edit(folder / "model_index.json", unet=[None, None], transformer=["diffusers", "HunyuanDiT2DModel"])
    with pytest.raises(ModelError, match="'HunyuanDiT2DModel' is not a denoiser"):
        load_model(folder)


def test_pipeline_without_a_denoiser(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    _edit(folder / "model_index.json", unet=[None, None])
    with pytest.raises(ModelError, match=r"has none of UNet2DConditionModel, .*; its components are"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("addition_embed_type", "image"),
        ("encoder_hid_dim_type", "image_proj"),
        ("attention_type", "gated"),
    ],
)
def test_denoisers_with_other_inputs(key: str, value: Any, tiny_copy: Copy) -> None:
    folder = tiny_copy()
    _edit(folder / "unet/config.json", **{key: value})
    with pytest.raises(ModelError, match=f"unet/config.json: the denoiser's config has {key}={value!r}"):
        load_model(folder)


def test_quantized_checkpoint(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    _edit(folder / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="is quantized already"):
        load_model(folder)


def test_code_in_the_folder_is_not_run(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    mark = folder / "executed"
    (folder / "vae/my_vae.py").write_text(f"open({str(mark)!r}, 'w')\nclass MyVae: ...\n")
    (folder / "pipeline.py").write_text(f"open({str(mark)!r}, 'w')\n")
    _edit(folder / "model_index.json", vae=["my_vae", "MyVae"])
    with pytest.raises(ModelError, match="the component 'vae' needs code from 'my_vae', which is not run"):
        load_model(folder)
    _edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"], _class_name=["pipeline", "Mine"])
    with pytest.raises(ModelError, match="pipelines that bring their own code are not run"):
        load_model(folder)
    assert not mark.exists()


def test_pipeline_class_that_diffusers_lacks(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    _edit(folder / "model_index.json", _class_name="StableDiffusion9Pipeline")
    with pytest.raises(ModelError, match=r"diffusers .* has no pipeline 'StableDiffusion9Pipeline'"):
        load_model(folder)


def test_component_that_diffusers_cannot_load(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    for file in (folder / "tokenizer").iterdir():
        file.write_text("{}")
    with pytest.raises(ModelError, match=r"diffusers cannot load the pipeline .*sd"):
        load_model(folder)


def test_safety_checker_is_left_out(tiny_copy: Copy, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny_copy()
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    _edit(folder / "model_index.json", safety_checker=checker, requires_safety_checker=True)
    loaded = load_model(folder)
    assert loaded.pipeline is not None
    assert loaded.pipeline.safety_checker is None
    assert capfd.readouterr() == ("", "")


def test_broken_model_index(tiny_copy: Copy) -> None:
    folder = tiny_copy()
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index.json is not JSON"):
        load_model(folder)


def test_denoiser_in_memory() -> None:
    loaded = loaded_from_denoiser(random_unet("tiny_sdxl", torch.float16), name="made")
    assert (loaded.folder, loaded.pipeline, loaded.weights_dtype) == (None, None, "fp16")
    with pytest.raises(ModelError, match="'Linear' is not a denoiser"):
        loaded_from_denoiser(torch.nn.Linear(2, 2), name="made")
    with pytest.raises(ModelError, match=r"weights are torch\.float64; convert them"):
        loaded_from_denoiser(random_unet("tiny_sd", torch.float64), name="made")
