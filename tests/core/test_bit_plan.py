"""Bit plans: a readable file, clear errors, and what they do to layer plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qdexport.core.bit_plan import BitPlan, LayerBits, apply_bit_plan
from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.errors import RecipeError

ACTIVATION = QuantSpec(bits=8, symmetric=False, signed=False)


def layer(name: str, **changes: object) -> LayerPlan:
    facts = {"name": name, "kind": "linear", "weight": QuantSpec(bits=8), "activation": ACTIVATION, "group": name}
    return LayerPlan(**{**facts, **changes})  # type: ignore[arg-type]


PLANS = [
    layer("block.to_q", group="block.qkv", why="rule 1"),
    layer("block.to_k", group="block.qkv", why="rule 1"),
    layer("block.out", splits=(), why="rule 1"),
    layer("time", folded=True),
    layer("free", weight=None, activation=None, why="no rule matches"),
]


def plan(**widths: tuple[int, int]) -> BitPlan:
    layers = {
        "block.to_q": (4, 8),
        "block.to_k": (4, 8),
        "block.out": (2, 4),
        **{name.replace("__", "."): pair for name, pair in widths.items()},
    }
    return BitPlan(
        model="m",
        recipe="r",
        average_weight_bits=4.0,
        average_activation_bits=8.0,
        layers={name: LayerBits(weight=w, activation=a, why="test: why") for name, (w, a) in layers.items()},
    )


def test_a_saved_plan_is_readable_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    plan().save(path)
    text = path.read_text()
    assert "  block.out: {weight: 2, activation: 4, why: 'test: why'}\n" in text
    assert yaml.safe_load(text)["schema_version"] == 1
    assert BitPlan.load(path, PLANS) == plan()


def test_an_edited_plan_changes_the_widths(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    plan().save(path)
    path.write_text(
        path.read_text().replace("block.out: {weight: 2, activation: 4", "block.out: {weight: 3, activation: 6")
    )
    changed = {item.name: item for item in apply_bit_plan(PLANS, BitPlan.load(path))}
    out = changed["block.out"]
    assert out.weight is not None
    assert out.activation is not None
    assert (out.weight.bits, out.activation.bits) == (3, 6)
    assert out.why == "test: why"
    # nothing but the width changes
    assert out.activation.model_copy(update={"bits": 8}) == ACTIVATION
    assert changed["time"] == PLANS[3]
    assert changed["free"] == PLANS[4]


def test_sixteen_bits_are_floating_point() -> None:
    changed = apply_bit_plan(PLANS, plan(block__to_k=(16, 16)))
    assert [item.quantized for item in changed] == [True, False, True, False, False]
    assert changed[1].group == ""
    assert changed[1].parts == ("block.to_k",)


def test_layers_of_one_tensor_agree() -> None:
    with pytest.raises(
        RecipeError, match=r"block.to_q \(activation 8\) and block.to_k \(activation 4\) read one tensor"
    ):
        apply_bit_plan(PLANS, plan(block__to_k=(4, 4)))


def test_an_unknown_layer_is_named_with_its_neighbour() -> None:
    with pytest.raises(RecipeError, match=r"no layer 'block.to_qq'; did you mean 'block.to_q'"):
        apply_bit_plan(PLANS, plan(block__to_qq=(4, 4)))


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    plan().save(path)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "block.out" not in line))
    with pytest.raises(RecipeError, match=r"bits.yaml: 1 quantized layers have no widths: block.out"):
        BitPlan.load(path, PLANS)


def test_a_layer_without_quantizers_gets_none() -> None:
    with pytest.raises(RecipeError, match="free has 8 bits, but is not quantized"):
        apply_bit_plan(PLANS, plan(free=(8, 8)))
    assert apply_bit_plan(PLANS, plan(free=(16, 16)))[4] == PLANS[4]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 2", "weight: 9", "layers.block.out.weight: 9 bits are not possible; use 2 to 8, or 16"),
        ("weight: 2", "weight: 1", "1 bits are not possible"),
        ("weight: 2", "weight: 16", "weight 16 with activation 4: a layer is in floating point as a whole"),
        ("weight: 2", "wieght: 2", "layers.block.out.wieght: unknown key; did you mean 'weight'"),
        ("recipe: r", "recipes: r", "recipes: unknown key; did you mean 'recipe'"),
        ("layers:", "layers: [", "not valid YAML"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bits.yaml"
    plan().save(path)
    text = path.read_text()
    head, mark, tail = text.partition("\nmodel")
    path.write_text(head + mark + tail.replace(old, new, 1) if "layers" not in old else text.replace(old, new))
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        BitPlan.load(path)


def test_no_file() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml does not exist"):
        BitPlan.load(Path("nowhere.yaml"))
