"""The table of formats: every cell works or is refused by the name of a layer, with what to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdexport.core.formats import Format, capabilities_for, check_formats, format_of, formats_table, support
from qdexport.core.recipe import Recipe, load_recipe
from qdexport.core.spec import LayerPlan, QuantSpec, layer_precision, weight_storage
from qdexport.core.target import INT4_OPSET, TARGETS
from qdexport.errors import RecipeError

INT8 = QuantSpec(bits=8)
INT4 = QuantSpec(bits=4, granularity="per_channel")
SPECS = {
    Format.W8A8: (INT8, INT8),
    Format.W4A8: (INT4, INT8),
    Format.W8A16: (INT8, None),
    Format.W8A16_BLOCKED: (QuantSpec(bits=8, granularity="per_block", block_size=64), None),
    Format.W4A16: (INT4, None),
    Format.W4A16_BLOCKED: (QuantSpec(bits=4, granularity="per_block", block_size=64), None),
    Format.FP8: (QuantSpec(format="fp8", bits=8), QuantSpec(format="fp8", bits=8)),
    Format.NVFP4: (QuantSpec(format="nvfp4", bits=4), QuantSpec(format="nvfp4", bits=4)),
}


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("form", Format)
@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_cell(target, form, kind) -> None:
    weight, activation = SPECS[form]
    plan = LayerPlan(name="up.1.layer", kind=kind, weight=weight, activation=activation, why="rule 1")
    assert format_of(plan) is form
    cell = support(target, form, kind)
    assert bool(cell.refused) == (not cell.stored) == (not cell.computed)
    if cell.refused:
        with pytest.raises(RecipeError, match=r"layer up\.1\.layer .*rule 1.*: .* use ") as caught:
            check_formats([plan], target)
        assert target.name in str(caught.value)
        return
    check_formats([plan], target)
    # the decisions of the compiler are those of the table
    computed = layer_precision(plan, "body", int4_linear=target.int4_linear)
    stored = weight_storage(plan, int4_linear=target.int4_linear, int4_weight_only=target.opset >= INT4_OPSET)
    assert stored == cell.stored
    assert computed == cell.computed or (computed == "int4" and cell.computed == "int8")


def test_layers_without_codes_have_no_format() -> None:
    floating = LayerPlan(name="a", kind="conv", weight=None, activation=None)
    folded = LayerPlan(name="b", kind="linear", weight=INT4, activation=None, folded=True)
    assert format_of(floating) is format_of(folded) is None
    check_formats([floating, folded], TARGETS["onnxruntime"])


def recipe_of(form: Format, **changes: object) -> Recipe:
    weight, activation = SPECS[form]
    rule = {"match": "*", "kinds": ["linear"], "weight": weight, "activation": activation}
    return Recipe.model_validate({"name": "r", "rules": [{"match": "*", "weight": INT8}, rule], **changes})


def test_default_capabilities_that_cannot_are_left_out_and_named() -> None:
    target = TARGETS["tensorrt-rtx"]
    default = target.default_compute_capabilities
    assert capabilities_for(recipe_of(Format.W4A8), target, default) == (default, "")
    fitting, note = capabilities_for(recipe_of(Format.FP8), target, default)
    assert fitting == ("8.9", "12.0")
    assert note == "fp8 needs compute capability 8.9 or newer: the engine is not built for 8.6."
    assert capabilities_for(recipe_of(Format.NVFP4), target, default)[0] == ("12.0",)
    assert capabilities_for(recipe_of(Format.FP8), TARGETS["onnxruntime"], ()) == ((), "")


@pytest.mark.parametrize(("form", "asked"), [(Format.FP8, "8.6"), (Format.NVFP4, "8.9")])
def test_capabilities_that_were_asked_for_are_refused(form: Format, asked: str) -> None:
    recipe = recipe_of(form, compute_capabilities=(asked, "12.0"))
    with pytest.raises(RecipeError, match=rf"compute capability {asked} has no matrix products in {form}, which needs"):
        capabilities_for(recipe, TARGETS["tensorrt-rtx"], (asked, "12.0"))


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert formats_table() in text, f"write this into docs/formats.md:\n{formats_table()}"


@pytest.mark.parametrize(
    ("preset", "forms"),
    [
        ("w8a16", {Format.W8A16}),
        ("w4a16", {Format.W8A16, Format.W4A16_BLOCKED}),
        ("fp8", {Format.FP8}),
        ("nvfp4", {Format.W8A8, Format.NVFP4}),
    ],
)
def test_presets_have_the_format_of_their_name(preset: str, forms: set[Format]) -> None:
    rules = load_recipe(preset).rules
    plans = [
        LayerPlan(name="l", kind=kind, weight=rule.weight, activation=rule.activation)
        for rule in rules
        for kind in rule.kinds
    ]
    assert {format_of(plan) for plan in plans} == forms
    check_formats(plans, TARGETS["tensorrt-rtx"])
