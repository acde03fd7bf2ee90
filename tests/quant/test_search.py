"""Ranges of least error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdexport.core.spec import QuantSpec
from qdexport.quant.affine import fake_quantize_reference, parameters_from_range
from qdexport.quant.search import activation_range_of_least_error, weight_range


def _spec(bits: int, **changes: object) -> QuantSpec:
    observer = {"kind": "mse", "exponent": 2.0, **changes.pop("observer", {})}  # type: ignore[dict-item]
    return QuantSpec.model_validate({"bits": bits, "observer": observer, **changes})


def _error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero_point = parameters_from_range(low, high, spec)
    y = fake_quantize_reference(x, scale[:, None], zero_point[:, None], spec.qmin, spec.qmax)
    return (y - x).abs().pow(spec.observer.exponent).sum(dim=1)


@pytest.mark.parametrize("shape", [(6, 20), (6, 4, 3, 3)])
def test_minmax_of_a_weight(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    low, high = weight_range(weight, QuantSpec(bits=8, granularity="per_channel"))
    assert torch.equal(low, weight.flatten(1).amin(1))
    assert torch.equal(high, weight.flatten(1).amax(1))
    low, high = weight_range(weight, QuantSpec(bits=8))
    assert low.tolist() == [weight.min()]
    assert high.tolist() == [weight.max()]


@pytest.mark.parametrize("exponent", [2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_weight_search_is_as_good_as_all_25_ratios(bits: int, exponent: float) -> None:
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(bits))
    spec = _spec(bits, granularity="per_channel", observer={"exponent": exponent})
    found = _error(weight, *weight_range(weight, spec), spec)
    low, high = weight.amin(1), weight.amax(1)
    grid = torch.stack([_error(weight, low * r, high * r, spec) for r in torch.linspace(0.4, 1, 25)])
    # the search is not exhaustive: single channels may lie a little above the grid's best, the sum must not
    assert found.sum() <= grid.amin(0).sum() * 1.002
    # never worse than min-max; the search sums its 300 errors in another order
    assert bool((found <= grid[-1] * (1 + 300 * 2.0**-24)).all())


def test_channels_are_searched_independently() -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    spec = _spec(4, granularity="per_channel")
    low, high = weight_range(weight, spec)
    for channel in (0, 1, 3, 4):
        alone = weight_range(weight[channel : channel + 1], spec)
        # a sum over one row may be taken in another order than over five: then another ratio can win a tie
        torch.testing.assert_close(high[channel : channel + 1], alone[1], rtol=0.02, atol=0)
    assert low[2] == high[2] == 0


def test_half_precision_weights_give_the_same_range() -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)).half()
    for spec in (_spec(4, granularity="per_channel"), QuantSpec(bits=8, granularity="per_channel")):
        half, single = weight_range(weight, spec), weight_range(weight.float(), spec)
        assert torch.equal(half[0], single[0])
        assert torch.equal(half[1], single[1])


def test_weights_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="minmax and mse, not percentile"):
        weight_range(torch.randn(2, 2), QuantSpec.model_validate({"bits": 8, "observer": {"kind": "percentile"}}))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6])
def test_activation_search_is_as_good_as_17_by_17(bits: int, symmetric: bool) -> None:
    values = torch.nn.functional.silu(3 * torch.randn(8192, generator=torch.Generator().manual_seed(bits)))
    values[0] = 60.0  # an outlier
    spec = _spec(bits, symmetric=symmetric, signed=symmetric)
    low, high = float(values.min()), float(values.max())
    found = activation_range_of_least_error(values, low, high, spec)
    ratios = torch.linspace(0.2, 1, 17)
    best = min(
        float(_error(values[None], torch.tensor([low * a]), torch.tensor([high * b]), spec))
        for a in ratios
        for b in (ratios if not symmetric else [a])
    )
    assert float(_error(values[None], *(torch.tensor([end]) for end in found), spec)) <= best * 1.01
    assert found[1] < high


def test_activation_search_keeps_the_range_of_a_uniform_sample() -> None:
    values = torch.linspace(-1, 1, 4097)
    low, high = activation_range_of_least_error(values, -1.0, 1.0, _spec(8, symmetric=False))
    # clipping costs more than 255 steps gain
    assert low == pytest.approx(-1, abs=0.02)
    assert high == pytest.approx(1, abs=0.02)


def test_activation_without_values_on_one_side() -> None:
    values = torch.rand(1000)
    low, high = activation_range_of_least_error(values, 0.0, float(values.max()), _spec(6, symmetric=False))
    assert low == 0
    assert 0 < high <= 1


def test_all_zero_activation() -> None:
    assert activation_range_of_least_error(torch.zeros(100), 0.0, 0.0, _spec(6, symmetric=False)) == (0, 0)
