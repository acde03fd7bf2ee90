"""Which timesteps have a row: by default all of the training where their table is small."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qdexport.core.target import TARGETS
from qdexport.errors import RecipeError
from qdexport.models.load import loaded_from_denoiser
from qdexport.models.synthetic import random_unet
from qdexport.pipeline.lower import capture_network
from qdexport.pipeline.time_rows import SMALL_TABLE, has_fractional_steps, time_rows, timestep_bounds

STEPS = (981, 500, 1)
EVERY = tuple(range(1000))


def model_of(choice="auto", steps=STEPS, body="fp32", denoiser="tiny_sd"):
    """As much of a fake-quant model as decides about rows."""
    loaded = loaded_from_denoiser(random_unet(denoiser), name="tiny")
    return SimpleNamespace(recipe=SimpleNamespace(time_embedding=choice), timesteps=steps, loaded=loaded, body=body)


def test_every_timestep_where_the_table_is_small():
    most = SMALL_TABLE // 1000 // 4
    assert time_rows(model_of(), most, fractions=False) == EVERY
    assert time_rows(model_of(), most + 1, fractions=False) == STEPS
    assert time_rows(model_of(body="fp16"), 2 * most, fractions=False) == EVERY
    assert time_rows(model_of(body="fp16"), 2 * most + 2, fractions=False) == STEPS
    # without a schedule there is nothing else to take
    assert time_rows(model_of(steps=()), most + 1, fractions=False) == EVERY
    assert time_rows(model_of("all"), most + 1, fractions=False) == EVERY
    assert time_rows(model_of("steps"), 1, fractions=False) == STEPS
    assert time_rows(model_of("keep"), 1, fractions=False) is None


def test_a_large_table_is_small_beside_many_weights(monkeypatch):
    model = model_of()
    weights = sum(parameter.numel() for parameter in model.loaded.denoiser.parameters())
    monkeypatch.setattr("qdexport.pipeline.time_rows.SMALL_TABLE", 0)
    monkeypatch.setattr("qdexport.pipeline.time_rows.SMALL_SHARE", 4000 * 50 / weights)
    assert time_rows(model, 50, fractions=False) == EVERY
    assert time_rows(model, 51, fractions=False) == STEPS


def test_a_scheduler_of_fractions_has_rows_beside_the_whole_steps():
    """KDPM2 ancestral's second calls are the same steps but for rounding."""
    steps = (999.0, 856.2857, 856.2861, 142.5, 1.6e-5)
    model = model_of(steps=steps)
    assert has_fractional_steps(model)
    assert time_rows(model, 1, fractions=True) == (*EVERY, 856.2857, 142.5)
    assert time_rows(model_of("steps", steps), 1, fractions=True) == (999.0, 856.2857, 142.5, 1.6e-5)


def test_steps_on_another_scale_are_the_schedules_alone():
    edm = (1.0955, 0.3835, -1.5537)
    model = model_of(steps=edm)
    assert has_fractional_steps(model)
    assert time_rows(model, 1, fractions=True) == edm
    assert timestep_bounds(model, fractions=True) == (-1.5537, 1000)
    assert timestep_bounds(model_of(), fractions=False) == (0, 999)
    assert not has_fractional_steps(model_of())


def test_flow_matching_keeps_the_steps_of_its_schedule():
    flow = (1000.0, 857.142822265625, 400.5)
    assert time_rows(model_of(steps=flow, denoiser="tiny_sd3"), 1, fractions=True) == flow
    with pytest.raises(RecipeError, match="`time_embedding: all` has a row for every whole timestep"):
        time_rows(model_of("all", flow, denoiser="tiny_sd3"), 1, fractions=True)
    with pytest.raises(RecipeError, match="quantized without one; say `keep`"):
        time_rows(model_of(steps=(), denoiser="tiny_sd3"), 1, fractions=True)
    with pytest.raises(RecipeError, match="quantized without one; say `all`"):
        time_rows(model_of("steps", ()), 1, fractions=False)


@pytest.mark.parametrize(
    ("choice", "steps", "rows", "dtype"),
    [
        ("auto", STEPS, 1000, "int64"),
        ("steps", STEPS, 3, "int64"),
        ("keep", STEPS, None, "float32"),
        ("auto", (999.0, 856.2857), 1001, "float32"),
    ],
)
def test_the_captured_network_says_what_it_has(with_equal_ranges, choice, steps, rows, dtype):
    network = capture_network(with_equal_ranges({"time_embedding": choice}, steps), TARGETS["tensorrt-rtx"])
    table = network.facts.time_table
    assert (None if table is None else len(table)) == rows
    assert network.context.timesteps == table
    assert network.facts.io.by_role("timestep").dtype == dtype
