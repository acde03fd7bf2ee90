"""One thing of a file with an FP16 body is changed: the layer is named (docs/reliability.md has the table)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.check.conftest import Compiled
from tests.check.test_float64 import Edit, measured
from tests.check.test_parity import constant, set_constant

CONV = "mid_block.resnets.0.conv1"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
Change = Callable[[np.ndarray], np.ndarray]


def changed(node_name: str, index: int, change: Change) -> Edit:
    """Gives a node a changed constant of its own."""

    def edit(proto: onnx.ModelProto) -> None:
        node = next(item for item in proto.graph.node if item.name == node_name)
        array = constant(proto, node.input[index])
        name = f"{node.input[index]}_changed"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(change(array.copy()), name))
        node.input[index] = name

    return edit


def of_constant(name: str, change: Change) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        set_constant(proto, name, change(constant(proto, name).copy()))

    return edit


def exchanged(first: str, second: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        a, b = (next(item for item in proto.graph.node if item.name == name) for name in (first, second))
        a.input[0], b.input[0] = b.input[0], a.input[0]

    return edit


def swapped(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[1:2], array[:1], array[2:]])


def one_more(array: np.ndarray) -> np.ndarray:
    place = np.unravel_index(np.abs(array).argmin(), array.shape)
    array[place] += 1
    return array


def by_a_percent(array: np.ndarray) -> np.ndarray:
    place = np.unravel_index(np.abs(array).argmax(), array.shape)
    array[place] *= array.dtype.type(1.01)
    return array


def moved(pads: np.ndarray) -> np.ndarray:
    return np.array([0, 0, 0, 0, 0, 0, *(pads[2:4] + pads[6:8])], pads.dtype)


@pytest.mark.parametrize(
    ("edit", "module"),
    [
        (of_constant(f"{CONV}.weight_quantizer/codes", swapped), CONV),
        (of_constant(f"{CONV}.weight_quantizer/codes", one_more), CONV),
        (of_constant(f"{CONV}/weight_scale", by_a_percent), CONV),
        (of_constant(f"{CONV}/weight_sums", one_more), CONV),
        (changed(f"{CONV}/Add_1", 1, np.zeros_like), CONV),
        (changed(f"{CONV}/Add_1", 1, by_a_percent), CONV),
        (changed(f"{CONV}.input_quantizer/Pad", 1, moved), CONV),
        (exchanged(f"{BLOCK}.attn1/Reshape", f"{BLOCK}.attn1/Reshape_1"), f"{BLOCK}.attn1"),
        (changed(f"{BLOCK}.attn1/Mul", 1, by_a_percent), f"{BLOCK}.attn1: attention is scaled by"),
        (changed("mid_block.resnets.0.norm2/Mul", 1, by_a_percent), "mid_block.resnets.0.norm2"),
    ],
)
def test_a_change_is_named(edit: Edit, module: str, stepped: Compiled, tmp_path: Path) -> None:
    problems = measured(stepped, edit, tmp_path).problems
    assert problems
    assert module in problems[0]
