"""Rules to plans."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from qdexport.core.recipe import Recipe, load_recipe, preset_names
from qdexport.core.spec import LayerPlan
from qdexport.errors import RecipeError
from qdexport.models.denoiser import io_spec, layer_macs, quantizable_layers, shortcut_splits, time_layers
from qdexport.models.load import LoadedModel, load_model
from qdexport.quant.plan import activation_keys, macs_share, plan_layers

W8 = {"bits": 8, "granularity": "per_channel"}
W4 = {"bits": 4, "granularity": "per_channel"}
A8 = {"bits": 8}
ALL = {"match": "*", "weight": W8, "activation": A8}


def _recipe(*rules: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "rules": rules, **changes})


def _plans(model: LoadedModel, *rules: dict[str, Any], **changes: Any) -> dict[str, LayerPlan]:
    return {plan.name: plan for plan in plan_layers(model.denoiser, _recipe(*rules, **changes))}


def test_every_layer_has_a_plan_and_time_layers_are_folded(tiny: LoadedModel) -> None:
    plans = _plans(tiny, ALL)
    assert list(plans) == list(quantizable_layers(tiny.denoiser))
    folded = time_layers(tiny.denoiser)
    assert folded
    for name, plan in plans.items():
        assert plan.folded == (name in folded)
        assert plan.quantized == (name not in folded)
    assert plans["conv_in"].kind == "conv"
    assert plans["conv_in"].why == "rule 1 (match: *)"
    assert "timestep alone" in plans["time_embedding.linear_1"].why


def test_time_layers_can_be_kept(tiny: LoadedModel) -> None:
    plans = _plans(tiny, ALL, time_embedding="keep")
    assert all(plan.quantized for plan in plans.values())


def test_last_rule_wins(tiny: LoadedModel) -> None:
    plans = _plans(
        tiny,
        ALL,
        {"match": "*.to_*", "weight": W4, "activation": A8},
        {"match": ["conv_in", "conv_out"]},
        {"match": r"re:.*\.to_out\.\d+", "weight": W8, "activation": A8},
    )
    widths = {name: plan.weight.bits if plan.weight else None for name, plan in plans.items() if not plan.folded}
    assert widths["conv_in"] is widths["conv_out"] is None
    assert not plans["conv_in"].quantized
    assert plans["conv_in"].why == "rule 3 (match: conv_in, conv_out)"
    attention = next(name for name in plans if name.endswith("attn1.to_q")).removesuffix("to_q")
    assert widths[f"{attention}to_q"] == 4
    assert widths[f"{attention}to_out.0"] == 8


def test_layers_without_a_rule_stay_in_floating_point(tiny: LoadedModel) -> None:
    plans = _plans(tiny, {"match": "*.attn1.*", "weight": W8, "activation": A8})
    assert not plans["conv_in"].quantized
    assert plans["conv_in"].why == "no rule matches"


def test_kinds(tiny: LoadedModel) -> None:
    plans = _plans(tiny, {"match": "*", "kinds": ["linear"], "weight": W8, "activation": A8})
    assert {plan.kind for plan in plans.values() if plan.quantized} == {"linear"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"match": "*.attn2.to_kk"},
            r"rule 2 \(match: \*\.attn2\.to_kk\) matches no layer of the model; did you mean",
        ),
        ({"match": "conv_inn"}, r"did you mean conv_in, conv_out\?"),
        ({"match": "*_shortcuts"}, r"did you mean .*conv_shortcut"),
        ({"match": "conv_in", "kinds": ["linear"]}, r"'conv_in' is a conv, but kinds is \['linear'\]"),
        ({"match": "?"}, "layers are named like conv_in"),
        ({"match": "re:to_k"}, r"rule 2 \(match: re:to_k\) matches no layer"),  # the whole path must match
    ],
)
def test_rule_that_matches_nothing(tiny: LoadedModel, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _plans(tiny, ALL, rule)


def test_rule_for_folded_layers_only_is_announced(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plans = _plans(tiny, ALL, {"match": "time_embedding.*", "weight": W4, "activation": A8})
    assert "matches only layers that become a table" in caplog.text
    assert plans["time_embedding.linear_1"].folded


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {**W8, "observer": {"kind": "percentile"}},
            "weight.observer.kind is 'percentile'; weights have minmax and mse",
        ),
        ({**W8, "signed": False}, "weight.signed is false"),
    ],
)
def test_weights_that_cannot_be(tiny: LoadedModel, weight: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _plans(tiny, {"match": "*", "weight": weight, "activation": A8})


def test_layers_that_read_one_tensor_share_a_group(tiny: LoadedModel) -> None:
    plans = _plans(tiny, ALL)
    attention = next(name for name in plans if name.endswith("attn1.to_q")).removesuffix("to_q")
    assert len({plans[f"{attention}to_{part}"].group for part in "qkv"}) == 1
    text = {plan.group for name, plan in plans.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert text == {"encoder_hidden_states"}
    assert plans["conv_in"].group == "conv_in"


def test_layers_that_disagree_about_one_tensor_get_groups_of_their_own(tiny: LoadedModel) -> None:
    a6 = {"bits": 6}
    plans = _plans(tiny, ALL, {"match": "*.attn1.to_v", "weight": W8, "activation": a6})
    attention = next(name for name in plans if name.endswith("attn1.to_q")).removesuffix("to_q")
    q, k, v = (plans[f"{attention}to_{part}"] for part in "qkv")
    assert q.group == k.group
    assert v.group == f"{q.group}@1"
    # another weight alone separates nothing
    plans = _plans(tiny, ALL, {"match": "*.attn1.to_v", "weight": W4, "activation": A8})
    assert plans[v.name].group == plans[q.name].group


def test_splits(tiny: LoadedModel) -> None:
    splits = shortcut_splits(tiny.denoiser)
    plans = plan_layers(tiny.denoiser, _recipe(ALL), splits=splits)
    split = {plan.name: plan for plan in plans if plan.splits}
    assert set(split) == set(splits)
    for name, plan in split.items():
        assert plan.splits == splits[name]
        assert activation_keys(plan) == (f"{plan.group}#0", f"{plan.group}#1")
        assert plan.parts == (f"{name}#0", f"{name}#1")


def test_activation_keys_of_plain_layers(tiny: LoadedModel) -> None:
    plans = _plans(tiny, ALL, {"match": "conv_out"})
    assert activation_keys(plans["conv_in"]) == ("conv_in",)
    assert activation_keys(plans["conv_out"]) == ()
    assert activation_keys(plans["time_embedding.linear_1"]) == ()


def test_layers_that_do_not_run_stay_out(tiny: LoadedModel) -> None:
    macs = dict.fromkeys(quantizable_layers(tiny.denoiser), 10)
    macs["conv_out"] = 0
    plans = {plan.name: plan for plan in plan_layers(tiny.denoiser, _recipe(ALL), macs)}
    assert not plans["conv_out"].quantized
    assert plans["conv_out"].why == "does not run"


def test_macs_share(tiny: LoadedModel) -> None:
    macs = dict.fromkeys(quantizable_layers(tiny.denoiser), 1)
    plans = plan_layers(tiny.denoiser, _recipe(ALL, {"match": "conv_in"}), macs)
    folded = len(time_layers(tiny.denoiser))
    assert macs_share(plans) == (len(plans) - folded - 1) / len(plans)
    assert macs_share([]) == 0


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-timestep", "w8a8-asym", "w6a6", "w4a8"])
def test_presets_plan_everything_but_the_time_path(preset: str) -> None:
    assert preset in preset_names()
    recipe = load_recipe(preset)
    denoiser = load_model("shapes").denoiser
    macs = layer_macs(denoiser, io_spec(denoiser, recipe.shapes, "fp32"))
    plans = plan_layers(denoiser, recipe, macs)
    assert all(plan.quantized or plan.folded for plan in plans)
    assert macs_share(plans) >= 0.99
