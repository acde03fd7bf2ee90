"""Another scheduler in the place of the model's own, by the names that people use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdexport.errors import ModelError
from qdexport.models.load import LoadedModel, load_model, loaded_from_denoiser
from qdexport.models.sampling import schedule
from qdexport.models.scheduler_choice import scheduler_names, with_scheduler
from qdexport.models.synthetic import random_unet


@pytest.fixture
def model(tiny_copy: Callable[[str], Path]) -> LoadedModel:
    return load_model(tiny_copy("sd"))


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("dpm++", "DPMSolverMultistepScheduler"),
        ("UniPC", "UniPCMultistepScheduler"),
        ("LCM", "LCMScheduler"),
    ],
)
def test_names(model: LoadedModel, choice: str, name: str) -> None:
    own = dict(model.scheduler.config)  # type: ignore[union-attr]
    other = with_scheduler(model, choice)
    assert type(other.scheduler).__name__ == name
    assert other.pipeline is not None
    assert other.pipeline.scheduler is other.scheduler
    assert other.scheduler.config["beta_schedule"] == own["beta_schedule"]


def test_settings_that_differ(model: LoadedModel) -> None:
    leading = schedule(with_scheduler(model, "Euler"), 7)
    assert all(isinstance(step, int) for step in leading)
    spread = schedule(with_scheduler(model, "Euler, timestep_spacing=linspace"), 7)
    assert spread[0] == 999
    assert any(isinstance(step, float) for step in spread)
    assert with_scheduler(model, "DPM++,use_karras_sigmas=true").scheduler.config["use_karras_sigmas"] is True  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("Eulr", "has no scheduler 'Eulr'; did you mean EulerDiscreteScheduler"),
        ("", "has no scheduler ''"),
        ("Euler,timestep_spacin=leading", "has no setting 'timestep_spacin'; did you mean timestep_spacing"),
        ("Euler,leading", "has no setting 'leading'"),
        ("Euler,beta_schedule=[", "the value of beta_schedule is no YAML"),
        ("Euler,beta_schedule=nonsense", "cannot be made"),
        ("FlowMatchEuler", "only one of them is for flow matching"),
        ("DDIM,num_train_timesteps=-5", "cannot be made"),
    ],
)
def test_what_is_refused(model: LoadedModel, choice: str, words: str) -> None:
    with pytest.raises(ModelError, match=words.replace("[", r"\[")):
        with_scheduler(model, choice)


ANOTHER_KIND = "was made for another kind of pipeline than StableDiffusionPipeline: "


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("DDPMWuerstchen", ANOTHER_KIND + "it has no order"),
        ("ScoreSdeVe", ANOTHER_KIND + "it has no step"),
        ("RePaint", ANOTHER_KIND + "it needs original_image, mask"),
        ("Amused", ANOTHER_KIND + "it needs mask_token_id"),
        ("KarrasVe", ANOTHER_KIND + "it needs sigma_hat, sigma_prev, sample_hat"),
        ("Helios", ANOTHER_KIND),
        ("SCM", ANOTHER_KIND),
    ],
)
def test_schedulers_of_other_pipelines_are_refused_by_name(model: LoadedModel, choice: str, words: str) -> None:
    """Not by what breaks inside of diffusers while it samples."""
    own = model.scheduler
    with pytest.raises(ModelError, match=rf"Scheduler {words}.*; choose a scheduler like DDIM"):
        with_scheduler(model, choice)
    assert model.pipeline is not None
    assert model.pipeline.scheduler is own


def test_a_package_that_is_missing_is_named(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class StandIn(type):
        _backends = ("torch", "no_such_package")

        def __getattr__(cls, name: str) -> object:
            if name.startswith("_"):
                raise AttributeError(name)
            raise ImportError(name)

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", StandIn("DPMSolverSDEScheduler", (), {}))
    with pytest.raises(ModelError, match=r"DPMSolverSDEScheduler needs .* not installed: pip install no_such_package"):
        with_scheduler(model, "DPMSolverSDE")


def test_too_few_steps_say_what_to_do(model: LoadedModel) -> None:
    pndm = with_scheduler(model, "PNDM")
    assert len(schedule(pndm, 4)) > 3
    with pytest.raises(ModelError, match=r"PNDMScheduler cannot sample in 3 steps: .*; give another number of steps"):
        schedule(pndm, 3)


def test_a_denoiser_alone_has_none() -> None:
    with pytest.raises(ModelError, match="has no scheduler to replace"):
        with_scheduler(loaded_from_denoiser(random_unet("tiny_sd"), name="tiny"), "Euler")


def test_every_scheduler_has_a_name() -> None:
    assert {"DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"} <= set(scheduler_names())
