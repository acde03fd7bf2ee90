"""Recipes: presets, files, overrides, and messages that name the line and the likely meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qdexport.core.recipe import Rule, load_recipe, preset_names, preset_text
from qdexport.core.spec import QuantSpec
from qdexport.errors import RecipeError

MINIMAL = """\
name: mine
rules:
  - match: "*"
    weight: {bits: 8, granularity: per_channel}
    activation: {bits: 8}
"""


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refused(source: str, message: str, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_are_named_like_their_files(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    first = next(line for line in preset_text(name).splitlines() if not line.startswith("#"))
    assert first == "schema_version: 1"


def test_a_recipe_with_all_defaults_can_be_loaded_again(written) -> None:
    recipe = load_recipe(written(MINIMAL))
    again = load_recipe(written(recipe.to_yaml()))
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert load_recipe(written(MINIMAL), {"calibration.seed": 7}).digest() != recipe.digest()


def test_overrides_replace_and_add(written) -> None:
    recipe = load_recipe(
        written(MINIMAL + "calibration: {prompts: 4}\n"),
        {"calibration.seed": 7, "shapes.batch": [1, 2, 8], "body": "fp16", "rules.0.weight.bits": 4},
    )
    assert (recipe.calibration.prompts, recipe.calibration.seed) == (4, 7)
    assert recipe.shapes.batch == (1, 2, 8)
    assert recipe.body == "fp16"
    assert recipe.rules[0].weight is not None
    assert recipe.rules[0].weight.bits == 4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("calibraton.seed", "unknown key 'calibraton'; did you mean 'calibration'"),
        ("name.first", "cannot set name.first: name is no mapping"),
        ("rules.first.match", "cannot set rules.first.match: rules is a list"),
        ("rules.7.match", "cannot set rules.7.match: rules has 1 entries"),
    ],
)
def test_an_override_of_what_is_not_there(written, key: str, message: str) -> None:
    refused(written(MINIMAL), message, {key: 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "calibraton:\n  prompts: 3\n",
            r"r\.yaml:6: unknown key 'calibraton'; did you mean 'calibration'\?",
        ),
        (
            MINIMAL + "calibration:\n  promts: 3\n",
            r"r\.yaml:7: unknown key 'calibration.promts'; did you mean 'prompts'\?",
        ),
        (MINIMAL.replace("match", "mach"), r"r\.yaml:3: unknown key 'rules.0.mach'; did you mean 'match'\?"),
        (
            MINIMAL.replace("{bits: 8}", "{bit: 8}"),
            r"unknown key 'rules.0.activation.bit'; did you mean 'bits'\?",
        ),
        (MINIMAL + "zzz: 1\n", r"r\.yaml:6: unknown key 'zzz'$"),
    ],
)
def test_unknown_keys_name_the_line_and_the_nearest_key(written, text: str, message: str) -> None:
    refused(written(text), message)


def test_the_line_is_that_of_the_value_and_not_of_the_first_key_of_its_name(written) -> None:
    """`bits` stands four times; the third is wrong. A rule that lacks a key is named by the line where it begins."""
    second = "  - match: '*out*'\n    weight:\n      bits: 12\n    activation: {bits: 8}\n  - weight: {bits: 8}\n"
    message = refused(written(MINIMAL + second), "bits")
    lines = (MINIMAL + second).splitlines()
    assert f"r.yaml:{lines.index('      bits: 12') + 1}: rules.1.weight.bits: Input should be" in message
    assert f"r.yaml:{len(lines)}: rules.2.match: Field required" in message


def test_what_an_override_set_is_named_by_it(written) -> None:
    message = refused(written(MINIMAL + "calibration:\n  prompts: 3\n"), "prompts", {"calibration.prompts": 0})
    assert message.startswith("--set: calibration.prompts: Input should be")


def test_all_problems_are_told_at_once(written) -> None:
    message = refused(written(MINIMAL + "calibration:\n  prompts: 0\n  sed: 1\nbody: int8\n"), "prompts")
    assert len(message.splitlines()) == 3
    assert "r.yaml:7: calibration.prompts: Input should be greater than or equal to 1" in message
    assert "unknown key 'calibration.sed'; did you mean 'seed'?" in message
    assert "r.yaml:9: body: Input should be 'auto', 'fp32' or 'fp16'" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    weight: {bits: 8, granularity: per_channel}\n", "", "a rule with activation needs weight too"),
        (
            "granularity: per_channel",
            "symmetric: false",
            "weights are quantized symmetrically: set weight.symmetric to true",
        ),
        ("{bits: 8}", "{bits: 8, granularity: per_channel}", "activations have one scale per tensor"),
        ("weight: {bits: 8", "weight: {block_size: 64, bits: 8", "per_block and block_size .* come together"),
        (
            "weight: {bits: 8, granularity: per_channel",
            "weight: {bits: 4, granularity: per_block, block_size: 64",
            "weights with a scale per block are weight-only",
        ),
        ("activation: {bits: 8}", "activation: {format: fp8}", "weight is int and activation fp8: a product has one"),
        ("activation: {bits: 8}", "activation: {format: fp8, bits: 4}", "format fp8 has 8 bits"),
        ("activation: {bits: 8}", "activation: {format: fp8, symmetric: false}", "format fp8 is symmetric and signed"),
        ("bits: 8, granularity: per_channel}\n    activation: {bits: 8}", "format: fp8}", "needs activation of the"),
        (
            "bits: 8, granularity: per_channel}\n    activation: {bits: 8}",
            "bits: 8}\nbit_allocation: {weight_target: 4}",
            "bit_allocation chooses widths .* which rule 1 does not have",
        ),
        (
            "bits: 8, granularity: per_channel}\n    activation: {bits: 8}",
            "format: nvfp4}\n    activation: {format: nvfp4}\nactivation_rows: per_step",
            "rule 1 has format nvfp4, .* set activation_rows: static",
        ),
        ("bits: 8, granularity: per_channel", "format: nvfp4, granularity: per_channel", "blocks of 16 by definition"),
        ('"*"', '"re:up_blocks.(["', r"'re:up_blocks.\(\[' is no regular expression"),
        ('"*"', '["conv_in", "re:*"]', r"'re:\*' is no regular expression"),
        ("{bits: 8}", "{bits: 9}", "rules.0.activation.bits: Input should be less than or equal to 8"),
        ("name: mine\n", "", "name: Field required"),
    ],
)
def test_rules_that_make_no_sense(written, old: str, new: str, message: str) -> None:
    refused(written(MINIMAL.replace(old, new)), message)


def test_a_rule_list_may_not_be_empty(written) -> None:
    refused(written("name: mine\nrules: []\n"), "rules: Tuple should have at least 1 item")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping with `name` and `rules`, not list"),
        ("", "must hold a mapping with `name` and `rules`, not NoneType"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(written, text: str, message: str) -> None:
    refused(written(text), message)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    refused(str(path), "r.yaml cannot be read: it is not UTF-8 text")


def test_a_file_or_preset_that_is_not_there(tmp_path: Path) -> None:
    refused(str(tmp_path / "gone.yaml"), "gone.yaml does not exist")
    message = refused("w8a9", r"no recipe 'w8a9'; did you mean 'w\da\d'\?")
    assert all(name in message for name in preset_names())
    assert "did you mean" not in refused("zzz", "no recipe 'zzz'")


@pytest.mark.parametrize(
    ("match", "name", "kind", "expected"),
    [
        ("*", "a.b", "conv", True),
        ("*.attn2.to_k", "down.0.attn2.to_k", "linear", True),
        ("*.attn2.to_k", "attn2.to_k", "linear", False),
        ("conv_in", "conv_in.x", "conv", False),
        ("*.attn[12].to_q", "b.attn2.to_q", "linear", True),
        ("*.attn[12].to_q", "b.attn3.to_q", "linear", False),
        ("re:.*attn(1|2)", "b.attn1", "linear", True),
        ("re:attn1", "b.attn1", "linear", False),
        (("conv_in", "re:conv_out"), "conv_out", "conv", True),
        (("conv_in", "conv_out"), "conv_mid", "conv", False),
    ],
)
def test_patterns(match: str | tuple[str, ...], name: str, kind: str, expected: bool) -> None:
    assert Rule(match=match).matches(name, kind) == expected


def test_kinds_restrict_a_rule() -> None:
    rule = Rule(match="*", kinds=("linear",))
    assert rule.matches("a", "linear")
    assert not rule.matches("a", "conv")


def test_a_quantizer_is_hashable_and_equal_by_value() -> None:
    """Equal quantizers of one input group are found through a dictionary."""
    assert len({QuantSpec(bits=8), QuantSpec(bits=8), QuantSpec(bits=4)}) == 2


def test_presets_use_keys_that_exist_only() -> None:
    for name in preset_names():
        data = yaml.safe_load(preset_text(name))
        assert load_recipe(name, {key: value for key, value in data.items() if key != "rules"}).name == name
