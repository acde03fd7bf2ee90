"""Every code of every width and zero point travels in INT8."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdexport.core.carrier import carrier_offset


@given(bits=st.integers(2, 8), signed=st.booleans(), data=st.data())
def test_the_offset_brings_every_code_into_int8(bits: int, signed: bool, data: st.DataObject) -> None:
    qmin = -(1 << (bits - 1)) if signed else 0
    qmax = qmin + (1 << bits) - 1
    zeros = np.float32(data.draw(st.lists(st.integers(qmin, qmax), min_size=1, max_size=4)))
    offset = carrier_offset(qmin, qmax, zeros)
    for zero in zeros:
        taken = zero if offset is None else offset
        assert qmin - taken >= -128
        assert qmax - taken <= 127
    if bits <= 7:
        assert offset is None  # the zero point itself: padding stays 0, no correction is needed


@pytest.mark.parametrize(
    ("bounds", "zeros", "offset"),
    [
        ((-128, 127), [0], None),
        ((0, 255), [128], None),
        ((0, 255), [0], 128),
        ((0, 255), [128, 127], 128),
        ((-128, 127), [1], 0),
        ((-128, 127), [0, -1], 0),
        ((0, 127), [127], None),
        ((0, 15), [0, 15], None),
    ],
)
def test_offsets(bounds: tuple[int, int], zeros: list[int], offset: int | None) -> None:
    assert carrier_offset(*bounds, np.float32(zeros)) == offset
