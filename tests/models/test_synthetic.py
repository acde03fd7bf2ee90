from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.denoiser import call_denoiser, example_inputs, io_spec
from qdexport.models.load import load_model
from qdexport.models.synthetic import empty_unet, random_unet
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd15", 859_520_964),
        ("sd21", 865_910_724),
        ("sdxl", 2_567_463_684),
        ("medium", 50_349_060),
        ("ddpm_cifar10", 35_746_307),
        ("ldm_uncond", 274_056_163),
        ("sdxl-turbo", 2_567_463_684),
        ("lcm", 859_602_884),
        ("dit", 749_826_464),
        ("pixart", 610_856_096),
        ("sd3", 2_028_328_000),
    ],
)
def test_sizes_of_the_published_models(name: str, parameters: int) -> None:
    unet = empty_unet(name)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert {p.device.type for p in unet.parameters()} == {"meta"}


def test_flux_blocks_are_those_of_the_published_model() -> None:
    whole = empty_unet("flux-blocks", num_layers=19, num_single_layers=38)
    assert sum(p.numel() for p in whole.parameters()) == 11_901_408_320


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd21", "tiny_sdxl", "tiny_lcm", "tiny_unet2d", "tiny_class"])
def test_tiny_models_have_every_feature(name: str) -> None:
    unet = empty_unet(name)
    assert sum(p.numel() for p in unet.parameters()) < 1_000_000
    names = [key for key, _ in unet.named_modules()]
    for feature in ("to_q", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"):
        assert any(key.endswith(feature) for key in names), feature


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match="no synthetic model 'sd99'; there are sd15, "):
        random_unet("sd99")


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_unet("tiny_sd", seed=3).state_dict()
    torch.manual_seed(2)
    again, other = random_unet("tiny_sd", seed=3).state_dict(), random_unet("tiny_sd", seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


def test_distribution_of_the_weights() -> None:
    unet = random_unet("medium")
    assert not unet.training
    weight = unet.get_parameter("mid_block.resnets.0.conv1.weight")
    fan_in = weight[0].numel()
    # 1.3 million numbers: the deviation of a sample deviation is below 0.1 %
    assert weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, rel=0.01)
    assert abs(weight.mean().item()) < 0.01 / math.sqrt(fan_in)
    norm = unet.get_submodule("mid_block.resnets.0.norm1")
    assert isinstance(norm, nn.GroupNorm)
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def test_rows_of_a_repeated_block_differ() -> None:
    # 2.9 million numbers come from a block of one million: no two output channels may be the same
    weight = random_unet("medium").get_parameter("up_blocks.0.resnets.0.conv1.weight")
    assert weight.numel() > 2_000_000
    assert torch.unique(weight.flatten(1), dim=0).shape[0] == weight.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_stay_in_range(dtype: torch.dtype) -> None:
    unet = random_unet("tiny_sdxl", dtype)
    assert {p.dtype for p in unet.parameters()} == {dtype}
    inputs = example_inputs(io_spec(unet, Shapes(), "fp32"), 0)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        output = call_denoiser(unet, inputs).float()
    assert 0.1 < output.std().item() < 10


def test_half_is_the_rounded_single() -> None:
    single, half = random_unet("tiny_sd", seed=1), random_unet("tiny_sd", torch.float16, seed=1)
    weight = single.get_parameter("conv_in.weight")
    # the block is rounded, then the scaled product: two roundings of 2^-11 each
    assert torch.allclose(half.get_parameter("conv_in.weight").float(), weight, rtol=2**-10, atol=1e-6)


def test_saving_a_pipeline_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    save_tiny_pipeline(tmp_path / "model", "sd", TinyOptions(scheduler="EulerDiscreteScheduler"))
    assert torch.equal(torch.randn(3), expected)
    assert type(load_model(tmp_path / "model").scheduler).__name__ == "EulerDiscreteScheduler"
