from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdexport.check.measure import sqnr_db
from qdexport.check.noise_floor import _Rounding, noise_floor, round_stochastically, summation_noise
from qdexport.core.io_spec import Dim, IoSpec, TensorSpec
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.ops import fake_quantize
from tests.check.conftest import Compiled


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float64, torch.float32), (torch.float32, torch.float16)])
def test_rounding_goes_to_a_neighbour_and_is_unbiased(wide: torch.dtype, narrow: torch.dtype) -> None:
    value = 1 + 0.3 * torch.finfo(narrow).eps  # three tenths of the way to the next number
    values = torch.full((100_000,), value, dtype=wide)
    for sign in (1, -1):
        rounded = round_stochastically(sign * values, generator())
        assert rounded.dtype == narrow
        assert set(rounded.abs().tolist()) == {1.0, 1 + torch.finfo(narrow).eps}
        # a share of n = 1e5 draws has the deviation sqrt(0.21 / n) = 0.0014
        assert float((rounded.abs() > 1).double().mean()) == pytest.approx(0.3, abs=0.006)


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float64, torch.float32), (torch.float32, torch.float16)])
def test_numbers_of_the_grid_stay(wide: torch.dtype, narrow: torch.dtype) -> None:
    grid = torch.randn(1000, generator=generator()).to(narrow)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(narrow).max, 6e-8], dtype=narrow)
    values = torch.cat([grid, special, 1e-5 * grid])  # the last are subnormal in FP16
    assert torch.equal(round_stochastically(values.to(wide), generator()), values)
    assert bool(round_stochastically(torch.tensor([torch.nan], dtype=wide), generator()).isnan().all())


def test_subnormal_half_numbers_have_one_distance() -> None:
    step = 2.0**-24
    rounded = round_stochastically(torch.full((100_000,), 10.25 * step), generator())
    assert set((rounded.double() / step).tolist()) == {10.0, 11.0}
    assert float((rounded.double() / step).mean()) == pytest.approx(10.25, abs=0.006)  # as above


def test_beyond_the_largest_number_is_infinity() -> None:
    rounded = round_stochastically(torch.tensor([70000.0, -1e30]), generator())
    assert rounded.tolist() == [torch.inf, -torch.inf]


def test_summation_noise_is_that_of_rounded_partial_sums(noise: np.random.Generator) -> None:
    count, sums = 200, 4000
    products = noise.standard_normal((sums, count)) + 0.1
    total = torch.zeros(sums)
    source = generator()
    for column in torch.from_numpy(products).T:
        total = round_stochastically(total.double() + column, source)
    exact = torch.from_numpy(products.sum(1))
    drawn = summation_noise(exact, torch.from_numpy((products**2).sum(1)), count, source)
    # the model takes the average position of a mantissa for each, and independent partial sums
    assert float(drawn.std()) == pytest.approx(float((total.double() - exact).std()), rel=0.1)


class Affine(nn.Module):
    """Three operators, called as a denoiser is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 512, dtype=dtype), requires_grad=False)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = sample * self.weight
        x = x + timestep.to(x.dtype)
        x.mul_(self.weight)
        return (x,)


def io_of(dtype: str) -> IoSpec:
    dims = tuple(Dim(low=size, best=size, high=size) for size in (64, 512))
    return IoSpec(
        inputs=(
            TensorSpec(name="sample", role="sample", dtype=dtype, dims=dims),
            TensorSpec(name="timestep", role="timestep", dtype="int64", dims=dims[:1]),
        ),
        outputs=(),
    )


@pytest.mark.parametrize(("name", "eps"), [("float32", 2.0**-23), ("float16", 2.0**-10)])
def test_a_case_computed_by_hand(name: str, eps: float) -> None:
    dtype = getattr(torch, name)
    model = SimpleNamespace(denoiser=Affine(dtype))
    sample = torch.randn(64, 512, generator=generator()).to(dtype)
    call = DenoiserCall(step=0, timestep=3, inputs={"sample": sample, "timestep": torch.tensor([3])}, batch=0)
    w, x = model.denoiser.weight.double(), sample.double()
    # x w, x w + 3, (x w + 3) w: each is rounded, the first two errors are multiplied by w; the variance of a
    # rounding is eps^2 / 6 of a square between the power of two below and the number: 0.541 of it on average
    values = [x * w, x * w + 3, (x * w + 3) * w]
    variance = [(value**2).mean() * 0.541 * eps**2 / 6 for value in values]
    spread = (w**2).mean()
    expected = 10 * np.log10(
        float((values[2] ** 2).mean() / (variance[0] * spread + variance[1] * spread + variance[2]))
    )
    (floor,) = noise_floor(model, io_of(name), [call], seeds=3)
    if name == "float32":
        # the reference is FP32 itself: its roundings to nearest have half the variance of random ones
        expected -= 10 * np.log10(1.5)
    # mantissas are not spread evenly here
    assert floor == pytest.approx(expected, abs=1.5)


def test_operators_keep_their_dtypes_and_write_in_place() -> None:
    base = torch.ones(4, dtype=torch.float16)
    with torch.no_grad(), _Rounding(generator()):
        view = base[1:]
        view += torch.full((3,), 0.5, dtype=torch.float16)
        wide = base.float() * 3
    assert base.tolist() == [1.0, 1.5, 1.5, 1.5]
    assert wide.dtype == torch.float32
    assert wide.tolist() == [3.0, 4.5, 4.5, 4.5]


def test_fake_quantization_stays_exact_in_single_precision() -> None:
    x = torch.randn(1000, generator=generator())
    x_half = x.half()
    arguments = (torch.tensor([0.1]), torch.tensor([3.0]), None, -128, 127, -1)
    with torch.no_grad(), _Rounding(generator()):
        rounded = fake_quantize(x, *arguments)
        half = fake_quantize(x_half, *arguments)
    assert torch.equal(rounded, fake_quantize(x, *arguments))
    exact = fake_quantize(x_half.float(), *arguments)
    # the same codes, times a scale, rounded to 11 bits
    assert float(((half.double() - exact).abs() / exact.abs().clamp(min=0.1)).max()) <= 2.0**-10
    assert half.dtype == torch.float16


def test_the_same_seeds_give_the_same_floor(static: Compiled) -> None:
    calls = static.calls[:1]
    first = noise_floor(static.model, static.io, calls, seeds=3)
    assert noise_floor(static.model, static.io, calls, seeds=3) == first
    # two codes that flip or not are a factor of thousands
    assert 10 < first[0] < 160


def test_a_half_precision_network_has_a_floor_in_reach_of_its_file(stepped: Compiled) -> None:
    seen: list[tuple[int, int]] = []
    floor = noise_floor(stepped.model, stepped.io, stepped.calls, 2, lambda *state: seen.append(state))
    # 11 bits at every operator: no better than one rounding (74 dB), no worse than 8-bit quantization
    assert 15 < min(floor) <= max(floor) < 74
    assert seen[-1] == (6, 6)


def test_weights_are_left_as_they_were(stepped: Compiled) -> None:
    before = {name: value.clone() for name, value in stepped.model.denoiser.state_dict().items()}
    noise_floor(stepped.model, stepped.io, stepped.calls[:1], seeds=1)
    after = stepped.model.denoiser.state_dict()
    assert all(
        torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items()
    )


def test_sqnr_of_the_reference_itself_is_infinite(static: Compiled) -> None:
    from qdexport.check.exact import exact_predictions

    exact = exact_predictions(static.model.denoiser, [static.calls[0].inputs])
    assert sqnr_db(exact[0], exact[0]) == np.inf
