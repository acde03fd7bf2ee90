"""Streaming observers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdexport.core.spec import ObserverSpec, QuantSpec
from qdexport.quant.affine import fake_quantize_reference, parameters_from_range
from qdexport.quant.observers import NonFiniteError, RangeObserver, make_observer
from qdexport.quant.search import activation_range_of_least_error

A8 = QuantSpec(bits=8)
KINDS = ("minmax", "ema_minmax", "percentile", "mse")


def _make(kind: str, rows: int = 1, **parameters: float) -> RangeObserver:
    spec = ObserverSpec.model_validate({"kind": kind, **parameters})
    return make_observer(spec, rows)


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


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_range_from_counts_is_as_good_as_one_from_all_values(bits: int, symmetric: bool) -> None:
    values = torch.nn.functional.silu(3 * _values(bits, 40, 500)) * (1 + 9 * (_values(1, 40, 500) > 3))
    spec = QuantSpec(bits=bits, symmetric=symmetric, signed=symmetric, observer=ObserverSpec(kind="mse", exponent=2.0))
    if symmetric:
        values = values + _values(2, 40, 500)
    observer = make_observer(spec.observer, 1)
    for part in values:
        observer.update(0, part)

    def error(low: float, high: float) -> float:
        scale, zero = parameters_from_range(torch.tensor([low]), torch.tensor([high]), spec)
        found = fake_quantize_reference(values, scale, zero, spec.qmin, spec.qmax)
        return float((found - values).double().square().sum())

    low, high = observer.ranges(spec)
    best = activation_range_of_least_error(values.flatten(), float(values.min()), float(values.max()), spec)
    # bins are 3 % of their values wide; 2 % of the error was the most that the search lost to that
    assert error(low.item(), high.item()) <= 1.04 * error(*best)
    assert error(low.item(), high.item()) < error(float(values.min()), float(values.max()))


def test_a_rare_large_value_is_not_missed() -> None:
    # one in 20,000: a sample of some thousand values would clip it for free; squared, it outweighs all roundings
    values = torch.cat([_values(0, 20000) * 0.01, torch.tensor([50.0])])
    observer = _make("mse", exponent=2.0)
    observer.update(0, values)
    assert observer.ranges(QuantSpec(bits=8, observer=ObserverSpec(kind="mse", exponent=2.0)))[1].item() > 49


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
