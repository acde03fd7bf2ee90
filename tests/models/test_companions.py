"""Which networks beside the denoiser are found, what they take and give, and how their weights are read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from qdexport.core.companion_facts import COMPANION_KEY, CompanionFacts
from qdexport.core.recipe import Companions, Shapes
from qdexport.errors import ModelError
from qdexport.models.companions import companion_facts, companion_of, find_companions, load_companion
from qdexport.models.denoiser_io import io_spec
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest, sample
from qdexport.models.stand_ins import in_place_of_parts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qdexport.models.loaded import LoadedModel

    Copy = Callable[[str], Path]

ALL = Companions()


def facts_of(loaded: LoadedModel, name: Any, shapes: Shapes | None = None, body: Any = "auto") -> CompanionFacts:
    shapes = shapes or Shapes()
    return companion_facts(loaded, name, io_spec(loaded, shapes, "fp32"), body, "tensorrt-rtx", shapes)


def dims(facts: CompanionFacts) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape() for spec in (*facts.io.inputs, *facts.io.outputs)}


def test_those_that_are_there_are_found(tiny_folders: dict[str, Path]) -> None:
    found = {name: find_companions(load_model(tiny_folders[name]), ALL) for name in ("sd", "sdxl", "unet2d")}
    assert {name: item.names for name, item in found.items()} == {
        "sd": ("text_encoder", "vae_decoder"),
        "sdxl": ("text_encoder", "text_encoder_2", "vae_decoder"),
        "unet2d": (),
    }
    assert not any(item.notes for item in found.values())


def test_what_a_recipe_names_must_be_there(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"])
    assert find_companions(loaded, Companions(networks="none")).names == ()
    chosen = find_companions(loaded, Companions(networks=("vae_decoder", "text_encoder")))
    assert chosen.names == ("text_encoder", "vae_decoder")
    with pytest.raises(ModelError, match=r"asks for text_encoder_2, but the model .* has no text_encoder_2; remove it"):
        find_companions(loaded, Companions(networks=("text_encoder_2",)))


def test_a_class_that_is_not_known_is_left_out_with_a_note_or_refused(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"])

    class AutoencoderOther:
        config: dict[str, Any] = {}  # noqa: RUF012  never changed

    loaded.pipeline.__dict__["vae"] = AutoencoderOther()
    found = find_companions(loaded, ALL)
    assert found.names == ("text_encoder",)
    assert "AutoencoderOther" in found.notes[0]
    assert "AutoencoderKL and AutoencoderTiny" in found.notes[0]
    with pytest.raises(ModelError, match="AutoencoderOther"):
        find_companions(loaded, Companions(networks=("vae_decoder",)))


def test_an_attention_mask_and_a_long_text_are_refused(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"])
    with pytest.raises(ModelError, match=r"reads 77 tokens at most, and shapes.tokens is 80"):
        facts_of(loaded, "text_encoder", Shapes(tokens=80))
    loaded.pipeline.text_encoder.config.use_attention_mask = True
    assert "attention mask" in find_companions(loaded, ALL).notes[0]


def test_inputs_and_outputs_of_stable_diffusion(tiny_folders: dict[str, Path]) -> None:
    """One row per image, where guidance gives the denoiser two; sizes and types are the denoiser's."""
    loaded = load_model(tiny_folders["sd"])
    shapes = Shapes(batch=(2, 4, 8), height=(8, 16), width=8)
    text, vae = (facts_of(loaded, name, shapes) for name in ("text_encoder", "vae_decoder"))
    assert dims(text) == {"input_ids": (2, 77), "encoder_hidden_states": (2, 77, 16)}
    images, channels, height, width = vae.io.inputs[0].dims
    assert (images.low, images.best, images.high) == (1, 2, 4)
    assert (height.low, height.high, width.dynamic, channels.best) == (8, 16, False, 4)
    assert vae.io.outputs[0].shape("high") == (4, 3, 32, 16)
    assert {spec.dtype for spec in (*vae.io.inputs, *vae.io.outputs, *text.io.outputs)} == {"float32"}
    assert (vae.body, text.body, text.hidden_layer) == ("fp16", "fp16", -1)
    assert vae.scaling_factor == loaded.pipeline.vae.config.scaling_factor == 0.18215
    assert CompanionFacts.from_metadata(vae.to_metadata(), "here") == vae
    with pytest.raises(ModelError, match="here is no text encoder"):
        CompanionFacts.from_metadata({COMPANION_KEY + "x": ""}, "here")
    unguided = replace(loaded, defaults=replace(loaded.defaults, cfg=False))
    assert dims(facts_of(unguided, "text_encoder", Shapes(batch=2)))["input_ids"] == (2, 77)


def test_inputs_and_outputs_of_xl(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sdxl"])
    first, second = (facts_of(loaded, name) for name in ("text_encoder", "text_encoder_2"))
    assert dims(first) == {"input_ids": (1, 77), "encoder_hidden_states_1": (1, 77, 16)}
    assert dims(second) == {"input_ids": (1, 77), "encoder_hidden_states_2": (1, 77, 16), "text_embeds": (1, 16)}
    assert first.hidden_layer == second.hidden_layer == -2
    vae = facts_of(loaded, "vae_decoder")
    assert vae.body == "fp32"
    assert "force_upcast" in vae.why_body
    assert facts_of(loaded, "vae_decoder", body="fp16").body == "fp16"


def test_networks_compute_what_the_pipeline_reads(tiny_folders: dict[str, Path]) -> None:
    """In FP32, with the very same weights; sums of written-out attention have another order, on numbers around 1."""
    loaded = load_model(tiny_folders["sdxl"])
    pipeline, ids = loaded.pipeline, torch.arange(77).unsqueeze(0)
    read, pooled = {}, None
    for name in ("text_encoder", "text_encoder_2"):
        network = load_companion(tiny_folders["sdxl"], facts_of(loaded, name, body="fp32"))
        with torch.no_grad():
            outputs, theirs = network({"input_ids": ids}), getattr(pipeline, name)(ids, output_hidden_states=True)
        read[name] = next(iter(outputs.values()))
        torch.testing.assert_close(read[name], theirs.hidden_states[-2], atol=1e-5, rtol=0)
        pooled = theirs[0]
    torch.testing.assert_close(outputs["text_embeds"], pooled, atol=1e-5, rtol=0)
    with torch.no_grad():
        prompt = pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert prompt[0].shape[-1] == sum(item.shape[-1] for item in read.values())
    vae = load_companion(tiny_folders["sdxl"], facts_of(loaded, "vae_decoder"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(vae({"latents": latents})["image"], pipeline.vae.decode(latents, return_dict=False)[0])


def test_an_autoencoder_tiny(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"])
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    loaded.pipeline.register_modules(vae=vae)
    network = companion_of(vae, facts_of(loaded, "vae_decoder", body="fp32"))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network({"latents": latents})["image"], vae.decode(latents, return_dict=False)[0])


def test_stand_ins_take_the_place_of_the_parts_and_leave_it(tiny_folders: dict[str, Path]) -> None:
    """The networks in the place of the pipeline's own parts make the same images; afterwards all is as before."""
    for family in ("sd", "sdxl"):
        loaded = load_model(tiny_folders[family])
        request = SampleRequest(prompts=("a", "b"), steps=2, batch_size=2)
        before = sample(loaded, request)
        networks = {
            name: load_companion(tiny_folders[family], facts_of(loaded, name, body="fp32"))
            for name in find_companions(loaded, ALL).names
        }
        called: list[str] = []

        def counted(name: str, network: Any, called: list[str] = called) -> Any:
            return lambda inputs: called.append(name) or network(inputs)

        with torch.no_grad(), in_place_of_parts(
            loaded.pipeline, {name: (item.facts, counted(name, item)) for name, item in networks.items()}
        ):
            within = sample(loaded, request)
        assert set(called) == set(networks)
        # sums in another order through two steps and the decoder, on images in [-1, 1]
        assert abs(within - before).max() < 1e-4
        count = len(called)
        assert (sample(loaded, request) == before).all()
        assert len(called) == count
        assert "decode" not in loaded.pipeline.vae.__dict__


def test_skipping_layers_is_refused(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sdxl"])
    network = load_companion(tiny_folders["sdxl"], facts_of(loaded, "text_encoder"))
    functions = {"text_encoder": (network.facts, network)}
    with torch.no_grad(), in_place_of_parts(loaded.pipeline, functions):
        result = loaded.pipeline.text_encoder(torch.arange(77).unsqueeze(0), output_hidden_states=True)
        assert result[0] is result.hidden_states[-2]
        with pytest.raises(ModelError, match="has no last_hidden_state, only hidden_states"):  # another layer's
            result.last_hidden_state  # noqa: B018  reading it is what fails
        with pytest.raises(ModelError, match="reads -3: leave clip_skip out"):
            result.hidden_states[-3]
        with pytest.raises(ModelError, match="no output -1"):
            result[-1]


@pytest.mark.parametrize(
    ("part", "file"), [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")]
)
def test_damaged_weights(part: str, file: str, tiny_copy: Copy, tiny_folders: dict[str, Path]) -> None:
    name: Any = "vae_decoder" if part == "vae" else part
    facts, folder = facts_of(load_model(tiny_folders["sd"]), name), tiny_copy("sd")
    path = folder / part / file
    tensors = load_file(path)
    lacking = next(key for key in tensors if key.startswith(("decoder.", "text_model.encoder.", "encoder.")))
    save_file({key: value for key, value in tensors.items() if key != lacking}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{file} lacks 1 weights of the config"):
        load_companion(folder, facts)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"{file} is truncated"):
        load_companion(folder, facts)
    (folder / part / "config.json").write_text(json.dumps([]))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_companion(folder, facts)
