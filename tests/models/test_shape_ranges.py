"""Ranges of the network and its optimization profiles, from the sizes of a recipe."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qdexport.core.io_spec import IoSpec
from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser_io import io_spec
from qdexport.models.shape_ranges import dims_of
from qdexport.models.synthetic import empty_unet

OWN = {"batch": 2, "height": 64, "width": 64, "tokens": 77}
PROFILES = [{"name": "square"}, {"batch": [2, 8], "height": [64, 96, 128], "tokens": [77, 154]}]


def ranges(**shapes: Any) -> dict[str, tuple[int, int, int]]:
    dims, _ = dims_of(Shapes(**shapes), OWN, 8)
    return {name: (dim.low, dim.best, dim.high) for name, dim in dims.items()}


def io_of(**shapes: Any) -> IoSpec:
    return io_spec(empty_unet("sd15"), Shapes(**shapes), "fp16")


def test_profiles_make_up_the_range_of_a_fixed_size() -> None:
    dims, profiles = dims_of(Shapes(profiles=PROFILES), OWN, 8)
    assert [(p.name, p.sizes("low"), p.sizes("best"), p.sizes("high")) for p in profiles] == [
        ("square", *[{"batch": 2, "height": 64, "tokens": 77}] * 3),
        (
            "1",
            {"batch": 2, "height": 64, "tokens": 77},
            {"batch": 2, "height": 96, "tokens": 77},
            {"batch": 8, "height": 128, "tokens": 154},
        ),
    ]
    assert not dims["width"].dynamic
    assert ranges(profiles=PROFILES)["height"] == (64, 64, 128)  # the best is that of the first profile


def test_a_range_holds_its_profiles() -> None:
    shapes = {"batch": (1, 2, 16), "profiles": [{"batch": 4}, {"batch": (8, 16)}]}
    assert ranges(**shapes)["batch"] == (1, 4, 16)
    shapes["batch"] = (1, 2, 8)
    with pytest.raises(RecipeError, match=r"profiles\.1\.batch is 8 to 16, outside shapes\.batch, 1 to 8; widen"):
        ranges(**shapes)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([{"height": 68}], r"shapes\.profiles\.0\.height is 68; this denoiser needs a multiple of 8"),
        ([{"name": "a", "tokens": [9, 5]}], r"profiles\.a\.tokens is \[9, 5\]; .*ascending"),
        ([{"batch": 4}, {"name": "b", "batch": 4}], "one and the same shape"),
    ],
)
def test_profiles_that_make_no_sense(profiles: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ranges(profiles=profiles)


def test_a_model_that_reads_no_text_has_no_tokens() -> None:
    with pytest.raises(RecipeError, match="profile 'x' sets tokens, which this denoiser does not have"):
        dims_of(Shapes(profiles=[{"name": "x", "tokens": 5, "batch": [1, 4]}]), {"batch": 1, "height": 8}, 2)


def test_names_are_different() -> None:
    with pytest.raises(ValidationError, match="two profiles have one name: 1, 1"):
        Shapes(profiles=[{"name": "1"}, {}])


def test_shapes_of_every_input_by_profile() -> None:
    io = io_of(profiles=PROFILES)
    assert io.profile_shapes() == {
        "square": {"sample": [[2, 4, 64, 64]] * 3, "encoder_hidden_states": [[2, 77, 768]] * 3},
        "1": {
            "sample": [[2, 4, 64, 64], [2, 4, 96, 64], [8, 4, 128, 64]],
            "encoder_hidden_states": [[2, 77, 768], [2, 77, 768], [8, 154, 768]],
        },
    }
    assert IoSpec.model_validate_json(io.model_dump_json()) == io


def test_without_profiles_there_is_one_of_the_whole_ranges() -> None:
    (profile,) = io_of(tokens=(1, 77, 231)).optimization_profiles()
    assert (profile.name, profile.sizes("high")) == ("0", {"tokens": 231})
    assert io_of().optimization_profiles() == ()


def test_a_network_at_fixed_sizes() -> None:
    io = io_of(batch=(1, 2, 8), tokens=(1, 77, 231))
    fixed = io.at({"tokens": 5})
    assert [spec.shape() for spec in fixed.inputs] == [(2, 4, 64, 64), (1,), (2, 5, 768)]
    assert not fixed.dynamic_dims
    with pytest.raises(ModelError, match="tokens 500 is outside the network's range 1 to 231"):
        io.at({"tokens": 500})
