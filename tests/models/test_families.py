"""Transformers, LCM, class labels and ControlNet residuals: inputs by name, calls, schedules and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser import call_denoiser, example_inputs, input_groups, io_spec, named_inputs, time_layers
from qdexport.models.denoiser_io import sized
from qdexport.models.load import LoadedModel, load_model
from qdexport.models.rotary import POSITIONS, RotaryTables, out_of_range
from qdexport.models.sampling import NamedDenoiser, SampleRequest, record_calls, sample, schedule
from qdexport.models.synthetic import empty_unet, random_unet
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline

SMALL = Shapes(batch=2, height=8, width=8, tokens=5)
SCHEDULERS = {"lcm": "LCMScheduler", "pixart": "DPMSolverMultistepScheduler"}


def _spec(denoiser: nn.Module, shapes: Shapes = SMALL) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {spec.name: (spec.role, spec.shape(), spec.dtype) for spec in io_spec(denoiser, shapes, "fp16").inputs}


def test_inputs_of_transformers() -> None:
    sample = ("sample", (2, 4, 8, 8), "float16")
    whole, fraction = ("timestep", (1,), "int64"), ("timestep", (1,), "float32")
    assert _spec(empty_unet("tiny_dit")) == {
        "sample": sample,
        "timestep": whole,
        "class_labels": ("class_labels", (2,), "int64"),
    }
    pixart = empty_unet("tiny_pixart", use_additional_conditions=True)
    assert _spec(pixart) == {
        "sample": sample,
        "timestep": whole,
        "encoder_hidden_states": ("text", (2, 5, 32), "float16"),
        "encoder_attention_mask": ("text_mask", (2, 5), "float16"),
        "resolution": ("image_size", (2, 2), "float16"),
        "aspect_ratio": ("image_size", (2, 1), "float16"),
    }
    assert _spec(empty_unet("tiny_sd3")) == {
        "sample": sample,
        "timestep": fraction,
        "encoder_hidden_states": ("text", (2, 5, 24), "float16"),
        "pooled_projections": ("text_pooled", (2, 16), "float16"),
    }
    assert _spec(empty_unet("tiny_flux")) == {
        "sample": ("sample", (2, 16, 16), "float16"),
        "timestep": fraction,
        "encoder_hidden_states": ("text", (2, 5, 24), "float16"),
        "guidance": ("guidance", (2,), "float16"),
        "pooled_projections": ("text_pooled", (2, 16), "float16"),
        "img_ids": ("position_ids", (16, 3), "int64"),
        "txt_ids": ("position_ids", (5, 3), "int64"),
    }
    assert "guidance" not in _spec(empty_unet("tiny_flux", guidance_embeds=False))


@pytest.mark.parametrize(
    ("name", "tokens"), [("tiny_pixart", 300), ("tiny_sd3", 333), ("tiny_flux", 512), ("tiny_lcm", 77)]
)
def test_the_text_is_as_long_as_pipelines_make_it(name: str, tokens: int) -> None:
    text = io_spec(empty_unet(name), Shapes(), "fp32").by_role("text")
    assert text is not None
    assert text.shape()[1] == tokens


def test_dit_computes_squares_only() -> None:
    with pytest.raises(RecipeError, match="computes squares of one size only"):
        io_spec(empty_unet("tiny_dit"), Shapes(height=8, width=12), "fp32")


# what diffusers' own call signature takes for each exported input
RENAMED = {"sample": "hidden_states"}


@pytest.mark.parametrize("name", ["tiny_dit", "tiny_pixart", "tiny_sd3", "tiny_flux"])
def test_calls_by_name_are_diffusers_calls_and_back(name: str) -> None:
    denoiser = random_unet(name)
    inputs = example_inputs(io_spec(denoiser, SMALL, "fp32"), 1)
    arguments: dict[str, Any] = {RENAMED.get(key, key): value for key, value in inputs.items()}
    arguments["timestep"] = inputs["timestep"].expand(2) / (1000 if name == "tiny_flux" else 1)
    if name in {"tiny_dit", "tiny_pixart"}:
        arguments["timestep"] = inputs["timestep"].expand(2)
    with torch.no_grad():
        expected = denoiser(**arguments, return_dict=False)[0]
        # one row of time features in place of two: another order of FP32 sums
        torch.testing.assert_close(call_denoiser(denoiser, inputs), expected, rtol=0, atol=1e-4)
    named = named_inputs(denoiser, (), {**arguments, "return_dict": False})
    assert named.keys() == inputs.keys()
    # a thousandth of FLUX's timestep, times 1000: two roundings; the others pass theirs on
    rounding = 2**-23 if name == "tiny_flux" else 0.0
    torch.testing.assert_close(named.pop("timestep"), inputs["timestep"], rtol=rounding, atol=0)
    assert all(torch.equal(named[key], inputs[key]) for key in named)


def test_what_depends_on_the_timestep_alone() -> None:
    """Class, pooled text and guidance stay in the network; PixArt's whole modulation is a table."""
    embedder = {f"timestep_embedder.linear_{number}" for number in (1, 2)}
    expected = {
        "tiny_dit": {f"transformer_blocks.{block}.norm1.emb.{layer}" for block in (0, 1) for layer in embedder},
        "tiny_pixart": {f"adaln_single.emb.{layer}" for layer in embedder} | {"adaln_single.linear"},
        "tiny_sd3": {f"time_text_embed.{layer}" for layer in embedder},
        "tiny_flux": {f"time_text_embed.{layer}" for layer in embedder},
        "tiny_lcm": set(),
        "tiny_class": {"time_embedding.linear_1", "time_embedding.linear_2"},
    }
    assert {name: set(time_layers(empty_unet(name))) for name in expected} == expected


def test_projections_that_share_an_input() -> None:
    groups = input_groups(empty_unet("tiny_flux"))
    joint = "transformer_blocks.0.attn"
    assert {groups[f"{joint}.add_{part}_proj"] for part in "qkv"} == {f"{joint}.input"}
    assert {groups[f"{joint}.to_{part}"] for part in "qkv"} == {f"{joint}.qkv"}
    single = "single_transformer_blocks.1"
    layers = [f"{single}.proj_mlp", *(f"{single}.attn.to_{part}" for part in "qkv")]
    assert len({groups[layer] for layer in layers}) == 1


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_residuals_of_a_controlnet(name: str) -> None:
    unet = random_unet(name)
    shapes = SMALL.model_copy(update={"controlnet": True})
    inputs = example_inputs(io_spec(unet, shapes, "fp32"), 0)
    residuals = {key: value for key, value in inputs.items() if "block_res" in key}
    assert [key.rpartition("_")[2] for key in residuals] == ["0", "1", "2", "3", "res"]
    with torch.no_grad():
        output = call_denoiser(unet, inputs)
        plain = {key: value for key, value in inputs.items() if key not in residuals}
        without = call_denoiser(unet, plain)
        assert not torch.allclose(output, without)
        zeros = {key: torch.zeros_like(value) for key, value in residuals.items()}
        assert torch.equal(call_denoiser(unet, {**plain, **zeros}), without)
    named = named_inputs(
        unet,
        (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]),
        {
            "added_cond_kwargs": {key: inputs[key] for key in ("text_embeds", "time_ids") if key in inputs},
            "down_block_additional_residuals": tuple(residuals[key] for key in list(residuals)[:-1]),
            "mid_block_additional_residual": residuals["mid_block_res"],
        },
    )
    assert named.keys() == inputs.keys()
    with pytest.raises(RecipeError, match=r"shapes.controlnet needs a UNet2DConditionModel"):
        io_spec(empty_unet("tiny_dit"), shapes, "fp32")


class TestRotary:
    def test_tables_hold_diffusers_numbers(self) -> None:
        flux: Any = random_unet("tiny_flux")
        ids = torch.randint(0, POSITIONS, (50, 3))
        tables = RotaryTables(10000, (4, 6, 6))
        for ours, theirs in zip(tables(ids), flux.pos_embed(ids), strict=True):
            assert torch.equal(ours, theirs)

    def test_positions_without_a_row_are_seen(self) -> None:
        inside, outside = torch.tensor([[0, 0, POSITIONS - 1]]), torch.tensor([[0, POSITIONS, 0]])
        assert out_of_range({"sample": torch.zeros(1)}) is None
        for ids, lost in ((inside, False), (outside, True), (-1 - inside, True)):
            guard = out_of_range({"img_ids": inside, "txt_ids": ids})
            assert guard is not None
            assert bool(guard.isnan()) is lost

    def test_positions_that_are_no_whole_numbers(self) -> None:
        flux = empty_unet("tiny_flux")
        arguments = {"hidden_states": torch.zeros(1, 4, 16), "timestep": torch.ones(1)}
        arguments["img_ids"] = torch.full((4, 3), 0.5)
        with pytest.raises(ModelError, match="img_ids holds positions that are no whole numbers"):
            named_inputs(flux, (), arguments)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model by family, loaded once."""
    models: dict[str, LoadedModel] = {}

    def load(family: Any) -> LoadedModel:
        if family not in models:
            options = TinyOptions(scheduler=SCHEDULERS.get(family, "DDIMScheduler"))
            folder = save_tiny_pipeline(tmp_path_factory.mktemp("family") / family, family, options)
            models[family] = sized(load_model(folder), Shapes(height=8, width=8))
        return models[family]

    return load


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux", "lcm", "class"])
def test_sampling_follows_the_schedule(sampled: Any, family: str) -> None:
    loaded = sampled(family)
    request = SampleRequest(prompts=("a cat", "a dog", "") if family != "class" else ("",) * 3, steps=3, batch_size=2)
    calls = record_calls(loaded, request)
    first = [call.timestep for call in calls if call.batch == 0]
    # FLUX's pipeline divides by 1000 in FP32 and we multiply again: three roundings
    assert first == pytest.approx(schedule(loaded, 3), rel=2**-21)
    io = io_spec(loaded, Shapes(), "fp32")
    assert {spec.name for spec in io.inputs} == calls[0].inputs.keys()
    assert all(call.inputs[spec.name].shape[1:] == spec.shape()[1:] for call in calls for spec in io.inputs)
    named = NamedDenoiser(lambda inputs: call_denoiser(loaded.denoiser, inputs), loaded.denoiser)
    images = sample(loaded, request)
    assert images.shape[:2] == (3, 3)
    assert np.isfinite(images).all()
    # equal but for FLUX's timestep, whose last bit may differ, and sums in batches of other sizes
    np.testing.assert_allclose(sample(loaded, request, denoiser=named), images, atol=1e-5)


def test_what_is_drawn_belongs_to_seed_and_prompt(sampled: Any) -> None:
    def first(family: str, **changes: Any) -> dict[str, Tensor]:
        request = {"prompts": ("a cat", "a dog"), "steps": 1, "batch_size": 2, **changes}
        return record_calls(sampled(family), SampleRequest(**request))[0].inputs

    text = first("sd3", seed=0)["encoder_hidden_states"]
    assert torch.equal(text, first("sd3", seed=5)["encoder_hidden_states"])
    assert torch.equal(text[0], text[1])  # the unguided half
    assert not torch.equal(text[2], text[3])
    labels = first("dit", seed=0)["class_labels"]
    assert labels[2:].tolist() == [1000, 1000]  # DiT's label of nothing
    assert labels[1] == first("dit", seed=1)["class_labels"][0]
    guided = first("lcm", guidance_scale=8.5)["timestep_cond"]
    assert not torch.equal(guided, first("lcm", guidance_scale=3.0)["timestep_cond"])


def test_the_schedule_of_flow_matching_depends_on_the_size(sampled: Any) -> None:
    small = sampled("flux")
    large = sized(small, Shapes(height=128, width=128))
    assert (large.defaults.height, small.defaults.height) == (128, 8)
    assert schedule(large, 4)[0] == schedule(small, 4)[0] == 1000
    assert schedule(large, 4)[2] > schedule(small, 4)[2]  # larger pictures need more noise


def test_guidance_that_is_an_input_does_not_double_the_rows(sampled: Any) -> None:
    assert [sampled(family).defaults.cfg for family in ("lcm", "flux", "dit", "sd3")] == [False, False, True, True]
    assert isinstance(sampled("lcm").folder, Path)
