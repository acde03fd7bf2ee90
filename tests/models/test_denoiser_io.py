from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser_io import (
    call_denoiser,
    check_denoiser,
    example_inputs,
    io_spec,
    named_inputs,
    size_multiple,
)
from qdexport.models.load import LoadedModel, loaded_from_denoiser
from qdexport.models.synthetic import empty_unet, random_unet


def _shapes(denoiser: nn.Module, **shapes: Any) -> dict[str, tuple[int, ...]]:
    io = io_spec(denoiser, Shapes(**shapes), "fp32")
    return {spec.name: spec.shape() for spec in (*io.inputs, *io.outputs)}


def test_stable_diffusion() -> None:
    assert list(_shapes(empty_unet("sd15")).items()) == [
        ("sample", (2, 4, 64, 64)),
        ("timestep", (1,)),
        ("encoder_hidden_states", (2, 77, 768)),
        ("noise_pred", (2, 4, 64, 64)),
    ]


def test_sdxl() -> None:
    assert list(_shapes(empty_unet("sdxl")).items()) == [
        ("sample", (2, 4, 128, 128)),
        ("timestep", (1,)),
        ("encoder_hidden_states", (2, 77, 2048)),
        ("text_embeds", (2, 1280)),
        ("time_ids", (2, 6)),
        ("noise_pred", (2, 4, 128, 128)),
    ]


def test_sdxl_refiner_has_five_time_ids() -> None:
    changes = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
    shapes = _shapes(empty_unet("sdxl", **changes))
    assert (shapes["text_embeds"], shapes["time_ids"]) == ((2, 1280), (2, 5))


def test_unconditional() -> None:
    assert _shapes(empty_unet("ddpm_cifar10")) == {
        "sample": (2, 3, 32, 32),
        "timestep": (1,),
        "noise_pred": (2, 3, 32, 32),
    }


def test_roles_and_types() -> None:
    for body, dtype in (("fp32", "float32"), ("fp16", "float16")):
        io = io_spec(empty_unet("tiny_sdxl"), Shapes(), body)
        assert [spec.role for spec in io.inputs] == ["sample", "timestep", "text", "text_pooled", "time_ids"]
        assert [spec.dtype for spec in io.inputs] == [dtype, "int64", dtype, dtype, dtype]
        assert (io.outputs[0].role, io.outputs[0].dtype) == ("prediction", dtype)
    with pytest.raises(RecipeError, match="no body type 'int8'; use fp32 or fp16"):
        io_spec(empty_unet("tiny_sd"), Shapes(), "int8")


@pytest.mark.parametrize(
    ("changes", "shape", "dtype"),
    [
        ({"num_class_embeds": 7}, (2,), "int64"),
        ({"class_embed_type": "timestep"}, (2,), "int64"),
        ({"class_embed_type": "identity"}, (2, 64), "float32"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}, (2, 12), "float32"),
        (
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
            (2, 12),
            "float32",
        ),
    ],
)
def test_class_labels(changes: dict[str, Any], shape: tuple[int, ...], dtype: str) -> None:
    unet = random_unet("tiny_sd", **changes)
    io = io_spec(unet, Shapes(), "fp32")
    labels = io.by_role("class_labels")
    assert labels is not None
    assert (labels.name, labels.shape(), labels.dtype) == ("class_labels", shape, dtype)
    with torch.no_grad():
        assert call_denoiser(unet, example_inputs(io, 0)).shape == (2, 4, 8, 8)


def test_loaded_model_gives_tokens_pooled_width_and_batch(tiny_models: dict[str, LoadedModel]) -> None:
    sdxl = io_spec(tiny_models["sdxl"], Shapes(), "fp32")
    assert {spec.name: spec.shape() for spec in sdxl.inputs} == {
        "sample": (2, 4, 8, 8),
        "timestep": (1,),
        "encoder_hidden_states": (2, 77, 32),
        "text_embeds": (2, 16),
        "time_ids": (2, 6),
    }
    tokenizer = tiny_models["sd"].pipeline.tokenizer  # type: ignore[union-attr]  # it is a whole pipeline
    tokenizer.model_max_length = 16
    try:
        text = io_spec(tiny_models["sd"], Shapes(), "fp32").by_role("text")
        assert text is not None
        assert text.shape() == (2, 16, 16)
        asked = io_spec(tiny_models["sd"], Shapes(tokens=5), "fp32").by_role("text")
        assert asked is not None
        assert asked.shape() == (2, 5, 16)
    finally:
        tokenizer.model_max_length = 77


def test_ranges() -> None:
    unet = random_unet("tiny_sd")
    io = io_spec(unet, Shapes(batch=(1, 4, 8), height=(4, 16), width=(16, 32)), "fp32")
    dims = {dim.name: (dim.low, dim.best, dim.high) for dim in io.inputs[0].dims if dim.name}
    # the model's own size is 8: inside the first range, below the second
    assert dims == {"batch": (1, 4, 8), "height": (4, 8, 16), "width": (16, 16, 32)}
    assert [dim.dynamic for dim in io.inputs[0].dims] == [True, False, True, True]
    assert io.inputs[2].dims[0] == io.inputs[0].dims[0]
    assert io.outputs[0].shape("high") == (8, 4, 16, 32)
    with torch.no_grad():
        assert call_denoiser(unet, example_inputs(io, 0)).shape == (4, 4, 8, 16)


@pytest.mark.parametrize("size", [9, (8, 9), (7, 8), (8, 9, 10)])
def test_sizes_that_cannot_be_halved(size: Any) -> None:
    unet = empty_unet("tiny_sd")
    assert size_multiple(unet) == 2
    with pytest.raises(RecipeError, match=r"shapes.height is \d; this denoiser needs a multiple of 2"):
        io_spec(unet, Shapes(height=size), "fp32")


def test_multiples_of_real_models() -> None:
    assert [size_multiple(empty_unet(name)) for name in ("sd15", "sdxl", "ddpm_cifar10", "medium")] == [
        8,
        4,
        8,
        4,
    ]


@pytest.mark.parametrize("value", [(4, 2), (4, 8, 6)])
def test_ranges_out_of_order(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"shapes.batch is .*ascending order"):
        io_spec(empty_unet("tiny_sd"), Shapes(batch=value), "fp32")


@pytest.mark.parametrize("value", [0, (0, 2)])
def test_sizes_below_one(value: Any) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Shapes(batch=value)


def test_config_without_a_size() -> None:
    with pytest.raises(RecipeError, match=r"no sample_size; set shapes\.height"):
        io_spec(empty_unet("tiny_sd", sample_size=None), Shapes(), "fp32")
    oblong = empty_unet("tiny_sd", sample_size=(8, 16))
    assert _shapes(oblong)["sample"] == (2, 4, 8, 16)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_unet2d"])
@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_example_inputs_run(name: str, body: str) -> None:
    unet = random_unet(name, torch.float16 if body == "fp16" else torch.float32)
    io = io_spec(unet, Shapes(), body)
    inputs = example_inputs(io, 3)
    assert {key: str(value.dtype).removeprefix("torch.") for key, value in inputs.items()} == {
        spec.name: spec.dtype for spec in io.inputs
    }
    with torch.no_grad():
        output = call_denoiser(unet, inputs)
    assert output.shape == io.outputs[0].shape()
    assert str(output.dtype) == f"torch.{io.outputs[0].dtype}"
    assert output.isfinite().all()


def test_example_inputs_are_reproducible_and_in_range() -> None:
    io = io_spec(empty_unet("tiny_sdxl"), Shapes(), "fp32")
    first, again, other = (example_inputs(io, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["sample"], other["sample"])
    half = example_inputs(io_spec(empty_unet("tiny_sdxl"), Shapes(), "fp16"), 0)
    assert torch.equal(first["sample"].half(), half["sample"])
    steps = {int(example_inputs(io, seed, train_timesteps=4)["timestep"]) for seed in range(50)}
    assert steps == {1, 2, 3}


class TestNamedInputs:
    sample, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 16)

    def _named(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return named_inputs(empty_unet("tiny_sdxl"), args, kwargs)

    @pytest.mark.parametrize(
        "timestep",
        [
            7,
            7.0,
            torch.tensor(7),
            torch.tensor([7.0]),
            torch.tensor([7, 7]),
            torch.tensor(7, dtype=torch.float16),
        ],
    )
    def test_timestep_becomes_int64(self, timestep: Any) -> None:
        named = self._named(self.sample, timestep, encoder_hidden_states=self.text, return_dict=False)
        assert list(named) == ["sample", "timestep", "encoder_hidden_states"]
        assert named["timestep"].dtype == torch.int64
        assert named["timestep"].tolist() == [7]
        assert named["sample"] is self.sample

    def test_added_conditions(self) -> None:
        added = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)}
        labels = torch.tensor([1, 2])
        named = self._named(
            self.sample, 7, self.text, labels, added_cond_kwargs=added, cross_attention_kwargs={}
        )
        assert named.keys() == {"sample", "timestep", "encoder_hidden_states", "class_labels", *added}

    def test_fractional_timestep(self) -> None:
        named = self._named(self.sample, torch.tensor(957.5, dtype=torch.float64), self.text)
        assert named["timestep"].dtype == torch.float32
        assert named["timestep"].tolist() == [957.5]

    def test_mixed_timesteps(self) -> None:
        with pytest.raises(ModelError, match=r"mixes the timesteps \[7, 8\]"):
            self._named(self.sample, torch.tensor([7, 8]), self.text)

    @pytest.mark.parametrize(
        "foreign",
        [
            {"mid_block_additional_residual": torch.zeros(1)},
            {"encoder_attention_mask": torch.zeros(1)},
            {"timestep_cond": torch.zeros(1)},
            {"cross_attention_kwargs": {"scale": 0.5}},
        ],
    )
    def test_foreign_inputs(self, foreign: dict[str, Any]) -> None:
        with pytest.raises(ModelError, match=f"passes {next(iter(foreign))} to the denoiser"):
            self._named(self.sample, 7, self.text, **foreign)

    def test_foreign_condition(self) -> None:
        with pytest.raises(ModelError, match="passes image_embeds to the denoiser"):
            self._named(self.sample, 7, self.text, added_cond_kwargs={"image_embeds": torch.zeros(1)})


def test_calls_by_name_equal_diffusers_calls() -> None:
    unet = random_unet("tiny_sdxl")
    inputs = example_inputs(io_spec(unet, Shapes(), "fp32"), 0)
    added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
    with torch.no_grad():
        expected = unet(
            inputs["sample"],
            int(inputs["timestep"]),
            inputs["encoder_hidden_states"],
            added_cond_kwargs=added,
        ).sample
        assert torch.equal(call_denoiser(unet, inputs), expected)


def test_supported_configs_pass() -> None:
    for name in ("sd15", "sdxl", "ddpm_cifar10"):
        check_denoiser(empty_unet(name).config)  # type: ignore[arg-type]  # a mapping


def test_loaded_model_without_guidance_has_one_row() -> None:
    loaded = loaded_from_denoiser(random_unet("tiny_unet2d"), name="made")
    assert not loaded.defaults.cfg
    batch = io_spec(loaded, Shapes(batch=(1, 4)), "fp32").inputs[0].dims[0]
    assert (batch.low, batch.best, batch.high) == (1, 1, 4)
