"""The roofline: which resource binds, what INT4 stores and costs, and that no rate is missing."""

from __future__ import annotations

import pytest

from qdexport.core.cost_model import CARDS, LayerShape, capabilities_of, predicted_seconds, stored_bytes
from qdexport.core.target import TARGETS
from qdexport.errors import RecipeError

LINEAR = LayerShape(
    name="l", kind="linear", macs=2 * 64 * 1024 * 1024, weights=1024 * 1024, channels=1024,
    inputs=2 * 64 * 1024, outputs=2 * 64 * 1024,
)  # fmt: skip
CONV = LayerShape(
    name="c", kind="conv", macs=64 * 64 * 640 * 640 * 9, weights=640 * 640 * 9, channels=640,
    inputs=64 * 64 * 640, outputs=64 * 64 * 640,
)  # fmt: skip


def test_every_capability_that_can_be_built_has_a_card() -> None:
    assert set(TARGETS["tensorrt-rtx"].compute_capabilities) <= set(CARDS)
    # a published property of all four generations: INT8 has at least twice the rate of FP16
    assert all(card.int8 >= 2 * card.fp16 for card in CARDS.values())


def test_capabilities() -> None:
    rtx = TARGETS["tensorrt-rtx"]
    assert capabilities_of(rtx) == rtx.default_compute_capabilities
    assert capabilities_of(rtx, ("8.0",)) == ("8.0",)
    assert capabilities_of(TARGETS["onnxruntime"]) == tuple(CARDS)
    with pytest.raises(RecipeError, match=r"compute capability 7\.5; the cost model has 8\.0"):
        capabilities_of(rtx, ("7.5",))


def test_int4_is_stored_where_the_target_can() -> None:
    scales = 4 * 1024
    assert stored_bytes(LINEAR, 4, int4_linear=True) == 1024 * 512 + scales
    assert stored_bytes(LINEAR, 2, int4_linear=True) == 1024 * 512 + scales  # no narrower storage than INT4
    assert stored_bytes(LINEAR, 5, int4_linear=True) == stored_bytes(LINEAR, 8, int4_linear=True)
    assert stored_bytes(LINEAR, 4, int4_linear=False) == 1024 * 1024 + scales
    assert stored_bytes(CONV, 4, int4_linear=True) == CONV.weights + 4 * 640
    assert stored_bytes(CONV, 16, int4_linear=True) == 2 * CONV.weights
    assert stored_bytes(CONV, 16, int4_linear=True, body_bytes=4) == 4 * CONV.weights


def test_a_compute_bound_layer_takes_its_operations() -> None:
    card = CARDS["8.6"]
    assert predicted_seconds(CONV, 8, "8.6", int4_linear=True) == pytest.approx(2 * CONV.macs / card.int8)
    assert predicted_seconds(CONV, 16, "8.6", int4_linear=True) == pytest.approx(2 * CONV.macs / card.fp16)
    # TF32
    assert predicted_seconds(CONV, 16, "8.6", int4_linear=True, body_bytes=4) == pytest.approx(
        4 * CONV.macs / card.fp16
    )


def test_a_memory_bound_layer_takes_its_bytes() -> None:
    card = CARDS["8.9"]
    moved = LINEAR.inputs + LINEAR.weights + 2 * LINEAR.outputs
    assert predicted_seconds(LINEAR, 8, "8.9", int4_linear=True) == pytest.approx(moved / card.bandwidth)


def test_int4_stores_less_but_moves_more() -> None:
    for capability in CARDS:
        eight = predicted_seconds(LINEAR, 8, capability, int4_linear=True)
        four = predicted_seconds(LINEAR, 4, capability, int4_linear=True)
        assert four - eight == pytest.approx(1.5 * LINEAR.weights / CARDS[capability].bandwidth)
        assert predicted_seconds(LINEAR, 4, capability, int4_linear=False) == eight


@pytest.mark.parametrize("bits", [0, 1, 9, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits are not possible"):
        stored_bytes(LINEAR, bits, int4_linear=True)
