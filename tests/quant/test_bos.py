"""The first token of the text: found, left alone by quantizers, and tied to its encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdexport.core.recipe import Recipe
from qdexport.core.spec import QuantSpec
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser import smallest_io, trace_denoiser
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.models.tiny import save_tiny_pipeline
from qdexport.quant import bos as bos_module
from qdexport.quant.attach import QuantizedModel, quantize_model, weight_scale
from qdexport.quant.bos import bos_layers, encoder_digest, find_bos
from qdexport.quant.calibrate import calibrate
from qdexport.quant.checkpoint import load_quantized, save_quantized
from qdexport.quant.modules import ActivationQuantizer, ChannelScale, QuantLinear, WeightQuantizer
from qdexport.quant.plan import plan_layers

MakeRecipe = Callable[..., Recipe]
SMALL = {"prompts": 1, "batch_size": 1, "steps": 1, "guidance_scale": 3.0, "seed": 7}
TEXT = "*.attn2.to_[kv]"


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "sdxl", "sdxl"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_layers_that_read_the_text(family: str) -> None:
    denoiser = random_unet(f"tiny_{family}")
    found = bos_layers(denoiser, trace_denoiser(denoiser, smallest_io(denoiser)))
    expected = {
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    assert found == expected
    assert len(found) == (8 if family == "sd" else 16)


def test_a_denoiser_without_text_is_refused() -> None:
    denoiser = random_unet("tiny_unet2d")
    with pytest.raises(RecipeError, match=r"needs cross-attention that reads the text as it is.*set `bos: off`"):
        bos_layers(denoiser, trace_denoiser(denoiser, smallest_io(denoiser)))


def test_plans_follow_the_recipe(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    plans = plan_layers(tiny.denoiser, make_recipe(bos="constant"))
    assert {plan.name for plan in plans if plan.bos} == {
        plan.name for plan in plans if plan.name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    assert not any(plan.bos for plan in plan_layers(tiny.denoiser, make_recipe()))


@torch.no_grad()
def test_embedding_is_the_encoders_own_sd(tiny: LoadedModel) -> None:
    found = find_bos(tiny)
    pipeline: Any = tiny.pipeline
    tokens = pipeline.tokenizer("anything", padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = pipeline.text_encoder(tokens)[0][0, 0]
    # the encoder ran on another batch: FP32 sums of some 32 terms of magnitude 1 in another order
    torch.testing.assert_close(found.embedding, expected, rtol=1e-5, atol=1e-5)
    assert found.embedding.dtype == torch.float32
    assert found.encoder == encoder_digest(tiny)
    assert len(found.encoder) == 64


@torch.no_grad()
def test_embedding_is_the_encoders_own_sdxl(tiny_sdxl: LoadedModel) -> None:
    pipeline: Any = tiny_sdxl.pipeline
    assert pipeline.config.force_zeros_for_empty_prompt  # half of the batch is zeros, which are no first token
    found = find_bos(tiny_sdxl).embedding
    parts = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokens = tokenizer("anything", padding="max_length", max_length=77, return_tensors="pt").input_ids
        parts.append(encoder(tokens, output_hidden_states=True).hidden_states[-2][0, 0])
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-5)
    assert found.abs().max() > 0


def test_an_encoder_that_looks_ahead_is_refused(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = tiny.pipeline
    encode = pipeline.encode_prompt

    def not_causal(*args: Any, **kwargs: Any) -> Any:
        embeddings, negative = encode(*args, **kwargs)
        embeddings = embeddings.clone()
        embeddings[:, 0] += embeddings[:, 1:].mean(dim=1)
        return embeddings, negative

    monkeypatch.setattr(pipeline, "encode_prompt", not_causal)
    with pytest.raises(ModelError, match=r"no causal first token: its embedding differs by [\d.]+% .*set `bos: off`"):
        find_bos(tiny)


def test_a_text_of_zeros_is_refused(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bos_module, "_text", lambda _loaded: torch.zeros(8, 77, 16))
    with pytest.raises(ModelError, match="is zero for every prompt"):
        find_bos(tiny)


def test_models_without_text_or_pipeline_are_refused(tmp_path: Path) -> None:
    bare = loaded_from_denoiser(random_unet("tiny_sd"), name="bare")
    with pytest.raises(ModelError, match=r"bare came without a text encoder.*give the whole pipeline's folder"):
        find_bos(bare)
    unconditional = load_model(save_tiny_pipeline(tmp_path / "unet2d", "unet2d"))
    with pytest.raises(ModelError, match="reads no text; set `bos: off`"):
        find_bos(unconditional)


# the layer


def _layer(linear: nn.Linear, scale: ChannelScale | None = None) -> QuantLinear:
    spec = QuantSpec(bits=4, granularity="per_channel")
    weight = linear.weight if scale is None else scale.weight(linear.weight)
    inputs = ActivationQuantizer(QuantSpec(bits=4), torch.full((1,), 0.3), torch.zeros(1))
    return QuantLinear.wrap(linear, inputs, WeightQuantizer(spec, weight_scale(weight, spec)), scale, bos=True)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_first_token_is_projected_in_floating_point(scaled: bool) -> None:
    linear = nn.Linear(8, 5)
    layer = _layer(linear, ChannelScale(torch.rand(8) * 5 + 1, "linear") if scaled else None)
    x = torch.randn(3, 7, 8)
    x[:, 0] *= 500
    x[1] = 0  # a zeroed negative prompt
    y = layer(x)
    assert y.shape == (3, 7, 5)
    assert torch.equal(y[:, :1], nn.functional.linear(x[:, :1], linear.weight, linear.bias))
    assert torch.equal(y[1], linear.bias.expand(7, 5))
    ((operand,), (kernel,)) = layer.operands(x), layer.kernels()
    assert operand.shape == (3, 6, 8)
    rest = nn.functional.linear(layer.input_quantizer(operand), layer.weight_quantizer(kernel), linear.bias)
    assert torch.equal(y[:, 1:], rest)
    assert not torch.equal(y[:, 1:], linear(x)[:, 1:])


@torch.no_grad()
def test_half_precision_first_token() -> None:
    linear = nn.Linear(8, 5).half()
    x = torch.randn(2, 3, 8).half()
    y = _layer(linear)(x)
    assert y.dtype == torch.float16
    assert torch.equal(y[:, :1], nn.functional.linear(x[:, :1], linear.weight, linear.bias))


# calibration and checkpoints


def _text_rule(make_recipe: MakeRecipe, **changes: Any) -> Recipe:
    rule = {
        "match": TEXT,
        "weight": {"bits": 8, "granularity": "per_channel"},
        "activation": {"bits": 8},
    }
    return make_recipe(rules=[rule], calibration=SMALL, **changes)


def test_ranges_never_saw_the_first_token(
    tiny: LoadedModel, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = tiny.pipeline
    encode = pipeline.encode_prompt

    def huge(*args: Any, **kwargs: Any) -> Any:
        found = [item.clone() for item in encode(*args, **kwargs)]
        for item in found:
            item[:, 0] *= 1000
        return tuple(found)

    expected = {}
    for bos in ("off", "constant"):
        recipe = _text_rule(make_recipe, bos=bos)
        expected[bos] = calibrate(tiny, plan_layers(tiny.denoiser, recipe), recipe).high["encoder_hidden_states"]
    monkeypatch.setattr(pipeline, "encode_prompt", huge)
    for bos in ("off", "constant"):
        recipe = _text_rule(make_recipe, bos=bos)
        high = calibrate(tiny, plan_layers(tiny.denoiser, recipe), recipe).high["encoder_hidden_states"]
        if bos == "constant":
            assert torch.equal(high, expected[bos])
        else:
            assert high > 100 * expected[bos]


def _quantized(model: LoadedModel, recipe: Recipe) -> QuantizedModel:
    plans = plan_layers(model.denoiser, recipe)
    ranges = replace(calibrate(model, plans, recipe), bos=find_bos(model))
    return quantize_model(model, plans, recipe, ranges)


def test_checkpoints_refuse_other_encoders(tiny_folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = load_model(tiny_folder)
    saved = _quantized(model, _text_rule(make_recipe, bos="constant"))
    save_quantized(saved, tmp_path / "checkpoint")
    again = load_quantized(tmp_path / "checkpoint")
    assert again.bos is not None
    assert saved.bos is not None
    assert torch.equal(again.bos.embedding, saved.bos.embedding)
    assert again.bos.encoder == saved.bos.encoder
    # the same pipeline in other types of weights has the same encoder
    half = load_model(tiny_folder, torch_dtype=torch.float16)
    assert encoder_digest(half) == encoder_digest(model)
    assert find_bos(half).encoder == saved.bos.encoder
    other = load_model(tmp_path / "checkpoint")
    with torch.no_grad():
        next(iter(other.pipeline.text_encoder.parameters()))[5, 3] += 0.5
    with pytest.raises(
        ModelError, match=r"first token of other text encoders than those of .*quantize the model again"
    ):
        load_quantized(tmp_path / "checkpoint", loaded=other)


def test_half_precision_bodies_keep_their_encoder(tiny_folder: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    saved = _quantized(load_model(tiny_folder), _text_rule(make_recipe, bos="constant", body="fp16"))
    save_quantized(saved, tmp_path / "checkpoint")
    assert load_quantized(tmp_path / "checkpoint").bos is not None


def test_the_digest_covers_what_the_embedding_depends_on(tiny: LoadedModel, tiny_sdxl: LoadedModel) -> None:
    before = encoder_digest(tiny_sdxl)
    assert before != encoder_digest(tiny)
    changed = copy.copy(tiny_sdxl.pipeline)
    changed.text_encoder = copy.deepcopy(changed.text_encoder)
    changed.text_encoder.config.num_hidden_layers = 1
    assert encoder_digest(replace(tiny_sdxl, pipeline=changed)) != before
    weights = copy.copy(tiny_sdxl.pipeline)
    weights.text_encoder_2 = copy.deepcopy(weights.text_encoder_2)
    with torch.no_grad():
        next(iter(weights.text_encoder_2.parameters()))[0, 0] += 0.25
    assert encoder_digest(replace(tiny_sdxl, pipeline=weights)) != before
    assert encoder_digest(tiny_sdxl) == before
    assert encoder_digest(replace(tiny_sdxl, pipeline=None)) == ""


def test_first_tokens_must_be_given(tiny: LoadedModel, make_recipe: MakeRecipe) -> None:
    recipe = _text_rule(make_recipe, bos="constant")
    plans = plan_layers(tiny.denoiser, recipe)
    ranges = calibrate(tiny, plans, recipe)
    with pytest.raises(ModelError, match="leaves the text's first token out"):
        quantize_model(tiny, plans, recipe, ranges)


@torch.no_grad()
def test_every_prompt_gives_the_first_token_the_stored_embedding(tiny: LoadedModel) -> None:
    pipeline: Any = tiny.pipeline
    stored = find_bos(tiny).embedding
    texts: list[Tensor] = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("", "a red cube", "xyz " * 40)]
    for text in texts:
        torch.testing.assert_close(text[0, 0], stored, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(texts[1][0, 1], stored, atol=1e-2)
