"""FP16 files: their constants are PyTorch's parameters, or exactly roundings of numbers that PyTorch has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qdexport.check.calls import check_calls
from qdexport.check.float64.compare import distance
from qdexport.check.float64.halves import half_units, unrounded_quotients
from qdexport.core.progress import SilentProgress
from qdexport.core.target import target_named
from qdexport.emit.inspect import load_onnx
from qdexport.models.load import LoadedModel
from qdexport.pipeline.lower import lower_to_onnx
from qdexport.pipeline.quantize import QuantizeSettings, make_quantized
from tests.check.conftest import SYMMETRIC, Compiled, recipe_of
from tests.check.test_float64 import measured
from tests.check.test_parity import constant, set_constant

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
NORM = f"{BLOCK}.norm1"
FEED_FORWARD = f"{BLOCK}.ff.net.0.proj"


@pytest.fixture(scope="module")
def scaled(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A block with channel scales that are no powers of two, and constants for the text's first token."""
    folder = tmp_path_factory.mktemp("scaled")
    channel_scale = {"match": f"{BLOCK}.*", "kinds": ["linear"], "max_ratio": 8, "power_of_two": False}
    rules = [{"match": [f"{BLOCK}.*", "conv_out"], "activation": SYMMETRIC}]
    recipe = recipe_of(rules, body="fp16", bos="constant", channel_scale=channel_scale)
    target = target_named("onnxruntime")
    model = make_quantized(tiny, recipe, QuantizeSettings(target=target, folder=folder / "state"), SilentProgress())
    lowered = lower_to_onnx(model, folder / "onnx", target)
    calls = check_calls(model, lowered.facts.io, 1, seed=0)
    return Compiled(model=model, path=lowered.file.path, io=lowered.facts.io, calls=calls)


def test_quotients_in_constants_and_in_those_of_the_first_token_are_no_difference(
    scaled: Compiled, tmp_path: Path
) -> None:
    names = {str(value.name).rpartition("/")[0] for value in _quotients(scaled)}
    assert NORM in names, "1 / r is in a norm, rounded to FP16"
    found = measured(scaled, None, tmp_path)
    assert (found.problems, found.notes) == ([], [])
    assert found.sqnr_db > 130
    assert found.rows["constants of the first token"] == 6  # keys and values; the token, zeros, and any other


def _quotients(compiled: Compiled) -> dict[object, torch.Tensor]:
    return dict(unrounded_quotients(load_onnx(compiled.path), compiled.model.denoiser))


@pytest.mark.parametrize(
    ("node", "module"),
    [
        (f"{NORM}/LayerNormalization", NORM),
        (f"{FEED_FORWARD}/Add", FEED_FORWARD),
        (f"{BLOCK}.ff.net.2/Add", f"{BLOCK}.ff.net.2"),
        ("conv_out/", "conv_out"),
    ],
)
def test_one_element_of_a_half_precision_constant_is_named(
    node: str, module: str, scaled: Compiled, tmp_path: Path
) -> None:
    """The largest by two units in the last place, which no rounding is off by."""

    def edit(proto: onnx.ModelProto) -> None:
        known = {item.name: item for item in proto.graph.initializer}
        nodes = [item for item in proto.graph.node if item.name.startswith(node)]
        names = [name for item in nodes for name in item.input if name in known]
        name = next(name for name in reversed(names) if _changeable(constant(proto, name)))
        array = constant(proto, name).copy()
        place = np.unravel_index(np.abs(array).argmax(), array.shape)
        array[place] *= np.float16(1.002)
        set_constant(proto, name, array)

    problems = measured(scaled, edit, tmp_path).problems
    assert problems
    assert module in problems[0]


def _changeable(array: np.ndarray) -> bool:
    return array.dtype == np.float16 and array.size > 1 and bool(array.any())


@pytest.mark.parametrize("row", [0, 1])
def test_a_constant_of_the_first_token_is_named(row: int, scaled: Compiled, tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        (name,) = [item.name for item in proto.graph.initializer if item.name.startswith("bos_table/rows")]
        array = constant(proto, name).copy()
        array[row, 0] += np.float16(0.002) * np.abs(array[:2]).max()
        set_constant(proto, name, array)

    problem = measured(scaled, edit, tmp_path).problems[0]
    assert "keys and values of the text's first token differ" in problem
    assert f"{BLOCK}.attn2.to_k, {'a zero token' if row else 'the first token'}" in problem


def test_a_rounding_is_half_a_unit() -> None:
    source = torch.Generator().manual_seed(0)
    numbers = torch.randn(20_000, generator=source, dtype=torch.float64) * torch.exp2(
        torch.randint(-30, 16, (20_000,), generator=source).double()
    )
    numbers = numbers[numbers.abs() < 65504]
    rounded = numbers.half()
    assert bool(((rounded.double() - numbers).abs() <= half_units(numbers)).all())
    assert distance(numbers, rounded, 1).worst == 0
    away = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)).double() + half_units(numbers)
    assert bool(((away - numbers).abs() > half_units(numbers)).all())
