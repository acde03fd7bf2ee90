from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdexport.errors import ModelError
from qdexport.models.conditions import check_guidance, check_prompts
from qdexport.models.denoiser import call_denoiser
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.sampling import (
    NamedDenoiser,
    SampleRequest,
    call_count,
    prompts_for,
    record_calls,
    sample,
    schedule,
)
from qdexport.models.shapes import parse_caption
from qdexport.models.synthetic import random_unet

PROMPTS = ("a red cat", "a blue dog", "two green birds")
FAMILIES = ("sd", "sdxl", "unet2d")


def _request(**changes: Any) -> SampleRequest:
    return SampleRequest(**{"prompts": PROMPTS, "steps": 3, "batch_size": 3, **changes})


def _with_scheduler(loaded: LoadedModel, name: str, **config: Any) -> LoadedModel:
    """The model with another scheduler, in a pipeline of its own."""
    import diffusers

    assert loaded.pipeline is not None
    scheduler = getattr(diffusers, name).from_config({**loaded.pipeline.scheduler.config, **config})
    parts = {**loaded.pipeline.components, "scheduler": scheduler}
    pipeline = type(loaded.pipeline)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return dataclasses.replace(loaded, pipeline=pipeline, scheduler=scheduler)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_depend_on_the_batch(family: str, tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models[family]
    together = sample(loaded, _request())
    single = sample(loaded, _request(batch_size=1))
    side = 8 if family == "unet2d" else 16
    assert together.shape == (3, 3, side, side)
    assert together.dtype == np.float32
    assert -1 <= together.min() < together.max() <= 1
    # kernels sum in another order for another batch: a few units of the last place of numbers of size 1,
    # amplified by three steps with guidance; another seed differs by more than 0.1
    np.testing.assert_allclose(single, together, rtol=0, atol=1e-3)
    assert np.abs(sample(loaded, _request(seed=1))[:2] - together[:2]).max() > 0.1


def test_latent_diffusion_without_text(tmp_path: Path) -> None:
    import diffusers

    vqvae = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )
    unet, scheduler = random_unet("tiny_unet2d"), diffusers.DDIMScheduler()
    diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    images = sample(loaded, _request())  # this pipeline returns [N, H, W, C] whatever it is asked for
    assert images.shape == (3, 3, 16, 16)
    assert [call.timestep for call in record_calls(loaded, _request())] == schedule(loaded, 3)


def test_ancestral_sampling_in_pixel_space(tmp_path: Path) -> None:
    import diffusers

    unet = random_unet("tiny_unet2d")
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    # the noise of every step is per image too; tolerance as above
    np.testing.assert_allclose(
        sample(loaded, _request(batch_size=1)), sample(loaded, _request()), rtol=0, atol=1e-3
    )


def test_image_i_has_the_seed_plus_i(tiny_models: dict[str, LoadedModel]) -> None:
    images = sample(tiny_models["sd"], _request(seed=10))
    last = sample(tiny_models["sd"], _request(seed=12, prompts=PROMPTS[2:]))
    np.testing.assert_allclose(last[0], images[2], rtol=0, atol=1e-3)  # as above


def test_noise_that_a_sampler_adds_is_per_image_too(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = _with_scheduler(tiny_models["sd"], "LCMScheduler")
    together = sample(loaded, _request(guidance_scale=1.0))
    np.testing.assert_allclose(
        sample(loaded, _request(guidance_scale=1.0, batch_size=2)), together, rtol=0, atol=1e-3
    )


def test_same_request_same_images(tiny_models: dict[str, LoadedModel]) -> None:
    first, second = (sample(tiny_models["sd"], _request()) for _ in range(2))
    assert np.array_equal(first, second)


def test_guidance_doubles_the_rows(tiny_models: dict[str, LoadedModel]) -> None:
    for scale, rows in ((None, 6), (4.0, 6), (1.0, 3)):
        calls = record_calls(tiny_models["sd"], _request(steps=1, guidance_scale=scale))
        assert calls[0].inputs["sample"].shape[0] == rows


def test_size_of_the_latent(tiny_models: dict[str, LoadedModel]) -> None:
    images = sample(tiny_models["sd"], _request(steps=1, height=4, width=12))
    assert images.shape == (3, 3, 8, 24)
    with pytest.raises(ModelError, match="a latent of 6 x 8 makes images of 12 x 16 pixels"):
        sample(tiny_models["sd"], _request(height=6))
    with pytest.raises(ModelError, match="makes images of its own size only"):
        sample(tiny_models["unet2d"], _request(height=16))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_denoiser_runs_in_place_and_is_taken_out_again(
    family: str, tiny_models: dict[str, LoadedModel]
) -> None:
    loaded = tiny_models[family]
    pipeline = loaded.pipeline
    assert pipeline is not None
    config, timesteps = dict(pipeline.config), []

    def zero(inputs: dict[str, Tensor]) -> Tensor:
        timesteps.append(int(inputs["timestep"]))
        return torch.zeros_like(inputs["sample"])

    swapped = sample(loaded, _request(), denoiser=NamedDenoiser(zero, loaded.denoiser))
    assert timesteps == schedule(loaded, 3)
    assert pipeline.unet is loaded.denoiser
    assert dict(pipeline.config) == config
    assert np.abs(swapped - sample(loaded, _request())).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_named_denoiser_is_the_same_denoiser(family: str, tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models[family]
    named = NamedDenoiser(lambda inputs: call_denoiser(loaded.denoiser, inputs), loaded.denoiser)
    assert np.array_equal(sample(loaded, _request(), denoiser=named), sample(loaded, _request()))
    assert not list(named.parameters())


def test_any_object_with_the_signature_will_do(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sd"]

    class Proxy:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return loaded.denoiser(*args, **kwargs)

    assert np.array_equal(sample(loaded, _request(), denoiser=Proxy()), sample(loaded, _request()))


def test_replaced_denoiser_of_the_loaded_model_is_used(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sd"]
    other = random_unet("tiny_sd", seed=5)
    images = sample(dataclasses.replace(loaded, denoiser=other), _request())
    assert np.array_equal(images, sample(loaded, _request(), denoiser=other))
    assert loaded.pipeline is not None
    assert loaded.pipeline.unet is loaded.denoiser


def test_denoiser_comes_back_after_an_error(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sd"]

    def fail(inputs: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        sample(loaded, _request(), denoiser=NamedDenoiser(fail, loaded.denoiser))
    assert loaded.pipeline is not None
    assert loaded.pipeline.unet is loaded.denoiser


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        ("DDIMScheduler", [0, 1, 2, 3]),
        ("PNDMScheduler", [0, 1, 1, 2, 3]),  # calls the second timestep twice
        ("HeunDiscreteScheduler", [0, 1, 1, 2, 2, 3, 3]),  # two calls per step after the first
    ],
)
def test_steps_count_timesteps_not_calls(
    scheduler: str, steps: list[int], tiny_models: dict[str, LoadedModel]
) -> None:
    config = {"skip_prk_steps": True, "timestep_spacing": "leading"}
    loaded = _with_scheduler(tiny_models["sd"], scheduler, **config)
    seen: list[tuple[int, int]] = []
    request = _request(steps=4, batch_size=2)
    sample(loaded, request, on_call=lambda step, timestep, _: seen.append((step, timestep)))
    assert [step for step, _ in seen] == steps * 2  # both batches start at 0
    assert call_count(loaded, request) == len(seen)
    timesteps = schedule(loaded, 4)
    assert all(timesteps[step] == timestep for step, timestep in seen)
    assert timesteps == sorted(timesteps, reverse=True)


def test_recorded_inputs_are_those_of_the_calls(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sdxl"]
    outputs: list[Tensor] = []

    def remember(inputs: dict[str, Tensor]) -> Tensor:
        outputs.append(call_denoiser(loaded.denoiser, inputs))
        return outputs[-1]

    request = _request(batch_size=2)
    sample(loaded, request, denoiser=NamedDenoiser(remember, loaded.denoiser))
    calls = record_calls(loaded, request)
    assert [(call.batch, call.step, call.timestep) for call in calls] == [
        (batch, step, timestep) for batch in (0, 1) for step, timestep in enumerate(schedule(loaded, 3))
    ]
    assert [call.inputs["sample"].shape[0] for call in calls] == [4, 4, 4, 2, 2, 2]
    for call, output in zip(calls, outputs, strict=True):
        assert int(call.inputs["timestep"]) == call.timestep
        with torch.no_grad():
            assert torch.equal(call_denoiser(loaded.denoiser, call.inputs), output)
    text = [call.inputs["encoder_hidden_states"] for call in calls]
    assert text[0] is text[2]  # kept once per batch
    assert calls[0].inputs["sample"] is not calls[1].inputs["sample"]


def test_one_step_batches_are_told_apart(tiny_models: dict[str, LoadedModel]) -> None:
    calls = record_calls(tiny_models["sd"], _request(steps=1, batch_size=1))
    assert [(call.batch, call.step) for call in calls] == [(0, 0), (1, 0), (2, 0)]


def test_progress(tiny_models: dict[str, LoadedModel]) -> None:
    ticks: list[tuple[int, int]] = []
    sample(
        tiny_models["unet2d"],
        _request(batch_size=2),
        on_progress=lambda done, total: ticks.append((done, total)),
    )
    assert ticks == [(number, 6) for number in range(1, 7)]


def test_fractional_timesteps_are_recorded_as_they_are(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = _with_scheduler(tiny_models["sd"], "EulerDiscreteScheduler", timestep_spacing="linspace")
    assert any(isinstance(step, float) for step in schedule(loaded, 3))
    assert np.isfinite(sample(loaded, _request())).all()  # diffusers' own denoiser takes them
    assert [call.timestep for call in record_calls(loaded, _request())] == schedule(loaded, 3)


def test_schedule_is_pure(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sd"]
    assert loaded.scheduler is not None
    loaded.scheduler.set_timesteps(7)
    assert schedule(loaded, 3) == [667, 334, 1]
    assert len(schedule(loaded)) == 25
    assert len(loaded.scheduler.timesteps) == 7
    with pytest.raises(ModelError, match="DDIMScheduler cannot sample in 2000 steps"):
        schedule(loaded, 2000)


def test_component_alone_cannot_be_sampled(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(tiny_folders["sd"] / "unet")
    with pytest.raises(ModelError, match=r"unet is a denoiser alone.*give the folder with model_index\.json"):
        sample(loaded, _request())
    with pytest.raises(ModelError, match="unet has no scheduler"):
        schedule(loaded)


def test_pipelines_that_start_from_a_picture(tiny_models: dict[str, LoadedModel]) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    loaded = tiny_models["sd"]
    assert loaded.pipeline is not None
    pipeline = StableDiffusionImg2ImgPipeline(**loaded.pipeline.components, requires_safety_checker=False)
    with pytest.raises(ModelError, match=r"StableDiffusionImg2ImgPipeline starts from a picture \(image\)"):
        sample(dataclasses.replace(loaded, pipeline=pipeline), _request())


def test_classes_that_no_pipeline_passes_come_from_the_seeds(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = dataclasses.replace(tiny_models["unet2d"], denoiser=random_unet("tiny_unet2d", num_class_embeds=50))
    together = record_calls(loaded, _request())
    labels = together[0].inputs["class_labels"]
    assert labels.dtype == torch.int64
    assert len(set(labels.tolist())) > 1
    assert all(torch.equal(call.inputs["class_labels"], labels) for call in together)
    alone = [record_calls(loaded, _request(seed=seed, prompts=("",)))[0].inputs["class_labels"] for seed in range(3)]
    assert torch.equal(torch.cat(alone), labels)


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"batch_size": 0}])
def test_empty_request(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="nothing to sample"):
        _request(**changes)


def test_prompts_of_other_models_are_distinct_and_seeded(tiny_models: dict[str, LoadedModel]) -> None:
    prompts = prompts_for(tiny_models["sd"], 40, seed=3)
    assert prompts == prompts_for(tiny_models["sd"], 40, seed=3)
    assert prompts != prompts_for(tiny_models["sd"], 40, seed=4)
    assert len(set(prompts)) == 40
    many = prompts_for(tiny_models["sd"], 150, seed=3)
    assert many[:40] == prompts
    assert len(many) == 150
    assert len(set(many)) == 64  # all there are
    assert all(text == text.strip() and len(text) > 10 for text in many)


def test_prompts_of_the_shapes_model_are_captions() -> None:
    loaded = load_model("shapes")
    for prompt in prompts_for(loaded, 20, seed=1):
        parse_caption(prompt)


def test_unconditional_models_need_no_prompts(tiny_models: dict[str, LoadedModel]) -> None:
    assert prompts_for(tiny_models["unet2d"], 3, seed=0) == ["", "", ""]
    component = loaded_from_denoiser(random_unet("tiny_sd"), name="made")
    assert len(prompts_for(component, 3, seed=0)) == 3


def test_tap_is_invisible_to_the_pipeline(tiny_models: dict[str, LoadedModel]) -> None:
    loaded = tiny_models["sdxl"]
    assert loaded.pipeline is not None
    seen: list[Any] = []

    def look(step: int, timestep: int, inputs: dict[str, Tensor]) -> None:
        unet = loaded.pipeline.unet  # type: ignore[union-attr]  # checked above
        seen.append((unet.dtype, unet.device.type, unet.config.in_channels, isinstance(unet, nn.Module)))

    sample(loaded, _request(steps=1), on_call=look)
    assert seen == [(torch.float32, "cpu", 4, True)]


def test_bundled_model_draws_what_it_is_asked_for() -> None:
    from qdexport.models.shapes_evaluator import load_evaluator

    loaded = load_model("shapes")
    prompts = prompts_for(loaded, 8, seed=0)
    images = sample(loaded, SampleRequest(prompts=tuple(prompts), batch_size=8))
    evaluator = load_evaluator()
    # 0.988 of 256 are aligned; fewer than 7 of 8 has a chance below one in 200
    assert evaluator.alignment(torch.from_numpy(images), prompts) >= 7 / 8


def test_prompts_and_guidance_that_change_nothing_are_refused(tiny_models: dict[str, LoadedModel]) -> None:
    pixels, text = tiny_models["unet2d"], tiny_models["sd"]
    with pytest.raises(ModelError, match="DDIMPipeline makes pictures from noise alone and takes no prompts"):
        check_prompts(pixels, PROMPTS)
    check_prompts(pixels, ("", ""))
    check_prompts(text, PROMPTS)
    with pytest.raises(ModelError, match=r"a guidance scale of 4 would change nothing: DDIMPipeline has no guidance"):
        sample(pixels, _request(guidance_scale=4.0))
    assert len(sample(pixels, _request(prompts=("",), guidance_scale=1.0))) == 1
    assert len(sample(text, _request(prompts=("a",), guidance_scale=4.0))) == 1


def test_guidance_of_a_model_that_samples_without_is_said_once(
    tiny_copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(tiny_copy("sd"))
    defaults = dataclasses.replace(loaded.defaults, guidance_scale=1.0, cfg=False)
    turbo = dataclasses.replace(loaded, name="a turbo", defaults=defaults)
    for scale in (None, 1.0, 3.0, 3.0):
        check_guidance(turbo, scale)
    check_guidance(loaded, 3.0)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "a turbo samples in few steps without guidance"
    ]
