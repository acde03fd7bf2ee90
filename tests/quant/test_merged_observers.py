"""Observers of groups of rows, made from those of the single rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdexport.core.spec import ObserverSpec, QuantSpec
from qdexport.quant.channel_scale import ChannelObserver
from qdexport.quant.observers import HistogramObserver, RangeObserver, make_observer

GROUPS = (0, 1, 0, 2, 1)  # not neighbours alone
BATCHES = 3


def _values(batch: int, row: int) -> Tensor:
    return torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(10 * batch + row)) * (1 + row) + row / 4


def _pair(kind: str) -> tuple[RangeObserver, RangeObserver]:
    """One observer of five rows, merged to three; and one of three rows that was fed with the groups directly."""
    spec = ObserverSpec.model_validate({"kind": kind, "percentile": 98.0, "momentum": 0.5, "exponent": 2.0})
    single, direct = make_observer(spec, len(GROUPS)), make_observer(spec, 3)
    for batch in range(BATCHES):
        for row, group in enumerate(GROUPS):
            x = _values(batch, row)
            single.update(row, x)
            direct.update(group, x)
        single.end_batch()
        direct.end_batch()
    return single.merged(GROUPS), direct


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(bits=4, symmetric=False, signed=False)])
def test_merged_is_the_observer_of_the_groups(kind: str, spec: QuantSpec) -> None:
    merged, direct = _pair(kind)
    for name, tensor in direct.state().items():
        assert torch.equal(merged.state()[name], tensor), name
    assert torch.equal(torch.stack(merged.ranges(spec)), torch.stack(direct.ranges(spec)))
    if isinstance(direct, HistogramObserver):
        counted = direct.histogram(1).count.sum()
        assert counted == 2 * BATCHES * 400  # nothing was lost on the way


def test_merged_averages_are_the_widest_of_the_group() -> None:
    """An average moves per row, so a group takes the widest average of its rows, not the average of the widest."""
    spec = ObserverSpec(kind="ema_minmax", momentum=0.5)
    observer = make_observer(spec, len(GROUPS))
    for batch in range(BATCHES):
        for row in range(len(GROUPS)):
            observer.update(row, _values(batch, row))
        observer.end_batch()
    low, high = observer.ranges(QuantSpec(bits=8))
    merged_low, merged_high = observer.merged(GROUPS).ranges(QuantSpec(bits=8))
    for group in range(3):
        rows = [row for row, other in enumerate(GROUPS) if other == group]
        assert merged_low[group] == min(low[row] for row in rows)
        assert merged_high[group] == max(high[row] for row in rows)
    assert merged_high[0] != observer.merged(GROUPS).high[0]  # it is an average


def test_channels_merge_too() -> None:
    single, direct = ChannelObserver(len(GROUPS), 1), ChannelObserver(3, 1)
    for row, group in enumerate(GROUPS):
        single.update(row, _values(0, row))
        direct.update(group, _values(0, row))
    merged = single.merged(GROUPS)
    assert isinstance(merged, ChannelObserver)
    assert torch.equal(merged.peaks, direct.peaks)


@pytest.mark.parametrize("kind", ["minmax", "ema_minmax", "percentile", "mse"])
def test_the_single_rows_stay(kind: str) -> None:
    spec = ObserverSpec.model_validate({"kind": kind})
    observer = make_observer(spec, 2)
    for row in range(2):
        observer.update(row, _values(0, row))
    observer.end_batch()
    before = {name: tensor.clone() for name, tensor in observer.state().items()}
    observer.merged((0, 0))
    for name, tensor in before.items():
        assert torch.equal(observer.state()[name], tensor), name


@pytest.mark.parametrize("kind", ["minmax", "ema_minmax", "percentile", "mse"])
def test_a_merged_range_does_not_depend_on_what_was_asked_before(kind: str) -> None:
    merged, other = _pair(kind)[0], _pair(kind)[0]
    for bits in (2, 4):
        merged.ranges(QuantSpec(bits=bits, symmetric=False))
    spec = QuantSpec(bits=8)
    assert torch.equal(torch.stack(merged.ranges(spec)), torch.stack(other.ranges(spec)))
