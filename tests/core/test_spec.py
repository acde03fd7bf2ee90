"""Integer ranges, layer parts and precisions."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qdexport.core.spec import LayerPlan, ObserverSpec, QuantSpec, layer_precision

INT8 = QuantSpec(bits=8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_integer_ranges(bits: int, signed: bool) -> None:
    spec = QuantSpec(bits=bits, signed=signed)
    assert spec.qmax - spec.qmin == 2**bits - 1
    assert (spec.qmin < 0) == signed
    assert spec.qmax >= 1


@pytest.mark.parametrize(
    "values", [{"bits": 1}, {"bits": 9}, {"bits": 8, "zero": 1}, {"bits": 8, "granularity": "x"}]
)
def test_impossible_quantizers_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        QuantSpec.model_validate(values)


@pytest.mark.parametrize(
    "values", [{"momentum": 1}, {"percentile": 50}, {"grid": 1}, {"exponent": 0}, {"kind": "best"}]
)
def test_impossible_observers_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ObserverSpec.model_validate(values)


@pytest.mark.parametrize(
    ("plan", "precision", "parts"),
    [
        (LayerPlan(name="a", kind="conv", weight=INT8, activation=INT8), "int8", ("a",)),
        (LayerPlan(name="a", kind="conv", weight=None, activation=None), "fp16", ("a",)),
        (LayerPlan(name="a", kind="linear", weight=INT8, activation=INT8, folded=True), "folded", ("a",)),
        (LayerPlan(name="a", kind="linear", weight=None, activation=None, folded=True), "folded", ("a",)),
        (
            LayerPlan(name="a", kind="conv", weight=INT8, activation=INT8, splits=(3, 5)),
            "int8",
            ("a#0", "a#1"),
        ),
        (LayerPlan(name="a", kind="conv", weight=None, activation=None, splits=(3, 5)), "fp16", ("a",)),
    ],
)
def test_coverage_of_a_layer(plan: LayerPlan, precision: str, parts: tuple[str, ...]) -> None:
    assert layer_precision(plan, "fp16") == precision
    assert plan.parts == parts
    assert plan.quantized == (precision == "int8")
