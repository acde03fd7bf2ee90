"""Sizes of dimensions that are expressions over names."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qdexport.graph.dimension import size_of

SIZES = {"height": 24, "width": 16}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("height", 24),
        ("height*width/4", 96),
        ("2*(height/8 + 1) - width", -8),
        ("height/16", None),  # no whole number
        ("height*batch", None),
        ("max(height, width)", None),
        ("height/0", None),
        ("a b", None),
        (None, None),
    ],
)
def test_expressions(text: str | None, size: int | None) -> None:
    assert size_of(ir.SymbolicDim(text), SIZES) == size


def test_numbers() -> None:
    assert size_of(7, {}) == 7
