"""CLIP and T5 beside transformers: what SD3, FLUX and PixArt read of each encoder, and T5 in FP16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from qdexport.core.recipe import Companions, Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.companions import companion_facts, example_companion_inputs, find_companions, load_companion
from qdexport.models.denoiser_io import io_spec, sized
from qdexport.models.load import load_model
from qdexport.models.sampling import SampleRequest, record_calls, sample
from qdexport.models.stand_ins import in_place_of_parts
from qdexport.models.tiny import TinyOptions, save_tiny_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.companion_facts import CompanionFacts
    from qdexport.models.companions import Companion

FAMILIES: Any = ("pixart", "sd3", "flux")
SMALL = Shapes(height=8, width=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    options = TinyOptions(text_encoders=True)
    return {family: save_tiny_pipeline(root / family, family, options) for family in FAMILIES}


def facts_of(folder: Path, name: Any, shapes: Shapes = SMALL, body: Any = "auto") -> CompanionFacts:
    loaded = load_model(folder)
    return companion_facts(loaded, name, io_spec(loaded, shapes, "fp32"), body, "tensorrt-rtx", shapes)


def loaded_network(folder: Path, name: Any, body: Any) -> Companion:
    return load_companion(folder, facts_of(folder, name, body=body))


def dims(facts: CompanionFacts) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape() for spec in (*facts.io.inputs, *facts.io.outputs)}


def test_every_encoder_gives_what_the_denoiser_reads(folders: dict[str, Path]) -> None:
    found = {family: find_companions(load_model(folders[family]), Companions()) for family in FAMILIES}
    assert {family: item.names[:-1] for family, item in found.items()} == {
        "pixart": ("text_encoder",),
        "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
        "flux": ("text_encoder", "text_encoder_2"),
    }
    assert all(item.names[-1] == "vae_decoder" and item.notes == () for item in found.values())
    encoders = [(family, name) for family in FAMILIES for name in found[family].names[:-1]]
    # guidance gives the denoiser two rows per image, FLUX's (distilled) one
    assert {(family, name): dims(facts_of(folders[family], name)) for family, name in encoders} == {
        ("pixart", "text_encoder"): {
            "input_ids": (1, 300), "attention_mask": (1, 300), "encoder_hidden_states": (1, 300, 32),
        },
        ("sd3", "text_encoder"): {
            "input_ids": (1, 77), "encoder_hidden_states_1": (1, 77, 8), "pooled_projections_1": (1, 8),
        },
        ("sd3", "text_encoder_2"): {
            "input_ids": (1, 77), "encoder_hidden_states_2": (1, 77, 8), "pooled_projections_2": (1, 8),
        },
        ("sd3", "text_encoder_3"): {"input_ids": (1, 256), "encoder_hidden_states_3": (1, 256, 24)},
        ("flux", "text_encoder"): {"input_ids": (2, 77), "pooled_projections": (2, 16)},
        ("flux", "text_encoder_2"): {"input_ids": (2, 512), "encoder_hidden_states": (2, 512, 24)},
    }  # fmt: skip


def test_sizes_of_flux_and_of_text(folders: dict[str, Path]) -> None:
    """FLUX's samples are tokens: the latent's height and width come from the recipe. T5 reads what CLIP leaves."""
    vae = facts_of(folders["flux"], "vae_decoder", Shapes(batch=2, height=(8, 16), width=12))
    assert vae.io.inputs[0].shape("low") == (2, 4, 8, 12)
    assert vae.io.outputs[0].shape("high") == (2, 3, 32, 24)
    texts = Shapes(height=8, width=8, tokens=(78, 205))
    t5, clip = (facts_of(folders["sd3"], name, texts) for name in ("text_encoder_3", "text_encoder"))
    assert [t5.io.inputs[0].shape(end) for end in ("low", "high")] == [(1, 1), (1, 128)]  # type: ignore[arg-type]
    assert not clip.io.dynamic_dims
    with pytest.raises(RecipeError, match=r"shapes.tokens is 77, and pipelines of SD3\w+ make texts of 78 to 589"):
        facts_of(folders["sd3"], "text_encoder_3", Shapes(height=8, width=8, tokens=77))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_networks_make_the_pipeline_s_images(family: str, folders: dict[str, Path]) -> None:
    """In FP32, in the place of the pipeline's own parts; sums in another order, on images in [-1, 1]."""
    loaded = sized(load_model(folders[family]), SMALL)
    request = SampleRequest(prompts=("a cat", "b"), steps=2, batch_size=2, height=8, width=8)
    before = sample(loaded, request)
    networks = {
        name: loaded_network(folders[family], name, "fp32") for name in find_companions(loaded, Companions()).names
    }
    called: list[str] = []

    def counted(name: str, network: Companion) -> Any:
        return lambda inputs: called.append(name) or network(inputs)

    functions = {name: (item.facts, counted(name, item)) for name, item in networks.items()}
    with torch.no_grad(), in_place_of_parts(loaded.pipeline, functions):
        within = sample(loaded, request)
    assert set(called) == set(networks)
    assert np.abs(within - before).max() < 1e-4
    assert np.ptp(before) > 0.1  # images, not constants
    assert (sample(loaded, request) == before).all()


@pytest.mark.parametrize("encoders", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_the_length_of_the_recipe(
    family: Any, encoders: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What is calibrated and checked is what is exported; the pipelines' own lengths are 300, 333 and 512."""
    folder = folders[family] if encoders else save_tiny_pipeline(tmp_path / family, family)
    loaded = sized(load_model(folder), SMALL.model_copy(update={"tokens": 96}))
    request = SampleRequest(prompts=("a",), steps=2, height=8, width=8)
    calls = record_calls(loaded, request)
    assert {call.inputs["encoder_hidden_states"].shape[1] for call in calls} == {96}
    for length in (77, 600):
        asked = SMALL.model_copy(update={"tokens": length})
        if (family, length) == ("sd3", 77):
            with pytest.raises(RecipeError, match=r"is 77, and pipelines of SD3\w+ make texts of 78 to 589"):
                sized(loaded, asked)
            with pytest.raises(RecipeError, match=r"is 64, and pipelines"):  # the low end of a range
                sized(loaded, SMALL.model_copy(update={"tokens": (64, 96, 333)}))
        elif (family, length) in {("sd3", 600), ("flux", 600)}:
            with pytest.raises(RecipeError, match=r"shapes.tokens is 600"):
                sized(loaded, asked)
        else:
            assert sized(loaded, asked).defaults.tokens == length


def test_what_a_pipeline_may_not_read(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["flux"])
    network = loaded_network(folders["flux"], "text_encoder", "fp16")
    with torch.no_grad(), in_place_of_parts(loaded.pipeline, {"text_encoder": (network.facts, network)}):
        result = loaded.pipeline.text_encoder(torch.arange(77).unsqueeze(0))
        assert result.pooler_output.shape == (1, 16)
        with pytest.raises(ModelError, match="the compiled text_encoder has no last_hidden_state, only pooler_output"):
            result.last_hidden_state  # noqa: B018  reading it is what fails
        with pytest.raises(ModelError, match="the compiled text_encoder has no output 0"):
            result[0]


def test_t5_in_fp16_keeps_its_stream_in_fp32(folders: dict[str, Path]) -> None:
    """A stream of 1e5, which FP16 cannot hold, comes through: T5 was trained in BF16, and reaches such numbers."""
    network = loaded_network(folders["pixart"], "text_encoder", "fp16")
    assert network.facts.wide_modules == ("wo",)
    parameters = dict(network.network.named_parameters())
    types = {name.removesuffix(".weight").rpartition(".")[2]: item.dtype for name, item in parameters.items()}
    assert types.pop("wo") == torch.float32
    assert set(types.values()) == {torch.float16}
    calls = example_companion_inputs(network, seed=0)
    with torch.no_grad():
        for name, item in network.network.named_parameters():
            if name.endswith("wo.weight"):
                item.mul_(1e5)
        wide = network(calls)["encoder_hidden_states"]
        exact = loaded_network(folders["pixart"], "text_encoder", "fp32")
        for name, item in exact.network.named_parameters():
            if name.endswith("wo.weight"):
                item.mul_(1e5)
        truth = exact(calls)["encoder_hidden_states"]
    # a norm brings it back to numbers around 1, which FP16 layers before it know to three digits
    assert (wide - truth).abs().max() < 0.02 * truth.abs().max()


def test_positions_are_those_of_transformers() -> None:
    """The table of buckets instead of its logarithm: equal numbers, at powers of two and beyond the largest one."""
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    encoder = T5EncoderModel(config).eval()
    attention: Any = encoder.get_submodule("encoder.block.0.layer.0.SelfAttention")
    expected = attention.compute_bias(300, 300)
    from qdexport.models.text_encoders import _buckets

    buckets = _buckets(attention, 300)
    assert buckets.dtype == torch.int32
    assert torch.equal(attention.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0), expected)


def test_encoders_that_are_left_out(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["sd3"])
    t5 = loaded.pipeline.text_encoder_3
    loaded.pipeline.register_modules(text_encoder=t5, text_encoder_3=None)
    found = find_companions(loaded, Companions())
    assert found.names == ("text_encoder_2", "vae_decoder")
    assert len(found.notes) == 1
    assert found.notes[0] == (
        "The text_encoder is not compiled: its class is T5EncoderModel, and a denoiser of class SD3Transformer2DModel "
        "reads CLIPTextModelWithProjection here."
    )
    pixart = load_model(folders["pixart"])
    pixart.pipeline.__dict__["text_encoder_2"] = t5
    notes = find_companions(pixart, Companions()).notes
    assert notes == ("The text_encoder_2 is not compiled: what a PixArtTransformer2DModel reads of it is not known.",)
