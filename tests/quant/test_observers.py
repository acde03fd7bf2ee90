"""Streaming observers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdexport.core.spec import ObserverSpec, QuantSpec
from qdexport.quant.observers import NonFiniteError, RangeObserver, make_observer

A8 = QuantSpec(bits=8)
KINDS = ("minmax", "ema_minmax", "percentile", "mse")


def _make(kind: str, rows: int = 1, seed: int = 0, **parameters: float) -> RangeObserver:
    spec = ObserverSpec.model_validate({"kind": kind, **parameters})
    return make_observer(spec, rows, name="layer", seed=seed)


def _values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_minmax_over_tensors_and_rows() -> None:
    observer = _make("minmax", rows=2)
    observer.update(0, torch.tensor([[1.0, -2.0]]))
    observer.update(0, torch.tensor([3.0]).half())
    assert observer.missing_rows == [1]
    observer.update(1, torch.tensor([0.5]))
    low, high = observer.ranges(A8)
    assert low.tolist() == [-2, 0.5]
    assert high.tolist() == [3, 0.5]
    assert observer.missing_rows == []


def test_ema_moves_once_per_batch() -> None:
    observer = _make("ema_minmax", momentum=0.9)
    for batch in ([1.0], [2.0, 5.0], [3.0]):  # a batch of prompts has many denoiser calls
        for value in batch:
            observer.update(0, torch.tensor([-value, value]))
        observer.end_batch()
    low, high = observer.ranges(A8)
    assert high.item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 5) + 0.1 * 3)
    assert low.item() == -high.item()


def test_ema_ranges_do_not_depend_on_who_asks() -> None:
    """MixDQ's code moves the average once per requested width (methods.md 2.4)."""
    once, often = _make("ema_minmax"), _make("ema_minmax")
    for value in (1.0, 2.0, 2.0, 2.0):
        for observer in (once, often):
            observer.update(0, torch.tensor([value]))
            observer.end_batch()
        for bits in (2, 4, 8):
            often.ranges(QuantSpec(bits=bits))
    expected = 1.0
    for value in (2.0, 2.0, 2.0):
        expected = 0.95 * expected + 0.05 * value
    assert once.ranges(A8)[1].item() == pytest.approx(expected)  # 1.143
    assert torch.equal(once.ranges(A8)[1], often.ranges(A8)[1])


def test_ema_of_a_row_that_one_batch_skips() -> None:
    observer = _make("ema_minmax", rows=2, momentum=0.5)
    observer.update(0, torch.tensor([1.0]))
    observer.end_batch()
    observer.update(1, torch.tensor([4.0]))
    observer.end_batch()
    assert observer.ranges(A8)[1].tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["minmax", "ema_minmax", "percentile"])
def test_range_does_not_depend_on_the_width(kind: str) -> None:
    observer = _make(kind)
    observer.update(0, _values(0, 1000))
    observer.end_batch()
    first = observer.ranges(QuantSpec(bits=2, symmetric=False, signed=False))
    for bits in (4, 8):
        again = observer.ranges(QuantSpec(bits=bits))
        assert torch.equal(torch.stack(first), torch.stack(again))


def test_mse_range_of_one_width_is_the_same_whatever_was_asked_before() -> None:
    observer, fresh = _make("mse"), _make("mse")
    for one in (observer, fresh):
        one.update(0, _values(0, 5000))
    observer.ranges(QuantSpec(bits=2))
    spec = QuantSpec(bits=4, symmetric=False)
    assert torch.equal(torch.stack(observer.ranges(spec)), torch.stack(fresh.ranges(spec)))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_within_one_bin(percentile: float) -> None:
    observer = _make("percentile", percentile=percentile)
    parts = [_values(seed, 20, 1000) * (1 + seed) for seed in range(3)]
    for part in parts:
        observer.update(0, part)
    low, high = observer.ranges(A8)
    values = torch.cat([part.flatten() for part in parts]).double()
    tail = (1 - percentile / 100) / 2
    # bins are 1/32 of their value wide
    assert high.item() == pytest.approx(values.quantile(1 - tail).item(), rel=1 / 32)
    assert low.item() == pytest.approx(values.quantile(tail).item(), rel=1 / 32)


def test_percentile_100_is_minmax_and_outliers_are_clipped_below() -> None:
    values = torch.cat([_values(0, 99999), torch.tensor([1e4])])
    everything, most = _make("percentile", percentile=100.0), _make("percentile", percentile=99.99)
    for observer in (everything, most):
        observer.update(0, values)
    assert everything.ranges(A8)[1].item() == 1e4
    assert everything.ranges(A8)[0].item() == values.min().item()
    assert most.ranges(A8)[1].item() < 6


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-30, -1e-30], [1e30, 2e30], [-5.0], [-1e9, 1.0]])
def test_percentile_of_odd_values_stays_inside_minmax(values: list[float]) -> None:
    observer = _make("percentile", percentile=99.0)
    observer.update(0, torch.tensor(values))
    low, high = observer.ranges(A8)
    assert observer.low.item() <= low.item() <= high.item() <= observer.high.item()


def test_mse_sample_is_bounded_and_spread_over_all_tensors() -> None:
    observer = _make("mse")
    for value in range(40):
        observer.update(0, torch.full((3000,), float(value)))
    state = observer.state()
    assert state["values"].shape == (1, 32768)
    counts = torch.bincount(state["values"][0].long(), minlength=40)
    # a uniform sample holds 819 of each, standard deviation 28
    assert counts.min() > 819 - 6 * 28
    assert counts.max() < 819 + 6 * 28
    assert observer.high.item() == 39


def test_mse_needs_no_full_sample() -> None:
    observer = _make("mse", rows=2)
    observer.update(1, _values(0, 10))
    observer.update(0, _values(1, 10))
    low, high = observer.ranges(QuantSpec(bits=4, symmetric=False))
    assert bool((low < high).all())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_state_goes_on_to_the_same_bits(kind: str) -> None:
    def feed(observer: RangeObserver, batch: int) -> None:
        for step in range(3):
            observer.update(step % 2, _values(10 * batch + step, 30000) * (1 + step))
        observer.end_batch()

    whole, first, second = (_make(kind, rows=2) for _ in range(3))
    for batch in range(4):
        feed(whole, batch)
    feed(first, 0)
    feed(first, 1)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    feed(second, 2)
    feed(second, 3)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    spec = QuantSpec(bits=6, symmetric=False)
    assert torch.equal(torch.stack(whole.ranges(spec)), torch.stack(second.ranges(spec)))


def test_state_of_another_observer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low is \[2\], expected \[1\]"):
        _make("minmax").load_state(_make("minmax", rows=2).state())


def test_another_seed_samples_other_values() -> None:
    states = []
    for seed in (0, 1):
        observer = _make("mse", seed=seed)
        observer.update(0, _values(0, 100000))
        states.append(observer.state()["values"])
    assert not torch.equal(*states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_refused(kind: str, bad: float) -> None:
    observer = _make(kind)
    with pytest.raises(NonFiniteError):
        observer.update(0, torch.tensor([1.0, bad, 2.0]))
    assert observer.missing_rows == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_strides(kind: str, dtype: torch.dtype) -> None:
    observer = _make(kind)
    x = _values(0, 8, 6, 4).to(dtype).permute(2, 0, 1)
    observer.update(0, x)
    observer.end_batch()
    assert observer.low.item() == x.float().min()
    assert observer.ranges(A8)[1].item() <= x.float().max()
