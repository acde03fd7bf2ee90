"""The operator: values, rows, and the gradients of LSQ (methods: EfficientDM 1.1(2), LSQ+)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdexport.quant.affine import fake_quantize_reference
from qdexport.quant.ops import NO_AXIS, fake_quantize

QMIN, QMAX = -8, 7


def _formula(x: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ/dx, dQ/ds, dQ/dz elementwise, straight from the papers; s and z broadcast."""
    code = (x / s).round() + z
    below, above = code < QMIN, code > QMAX
    inside = ~(below | above)
    scale = torch.where(inside, (x / s).round() - x / s, torch.where(below, QMIN - z, QMAX - z))
    return inside.float(), scale, torch.where(inside, torch.zeros_like(x), -s.expand_as(x))


def _gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, axis: int, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, zero_point)]
    y = fake_quantize(leaves[0], leaves[1], leaves[2], row, QMIN, QMAX, axis)
    (y * weights).sum().backward()
    return tuple(leaf.grad for leaf in leaves)  # type: ignore[return-value]


@pytest.fixture
def x() -> Tensor:
    # reaches beyond both ends of every scale below
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))


def test_gradients_per_tensor(x: Tensor, weights: Tensor) -> None:
    scale, zero_point = torch.tensor([0.3]), torch.tensor([1.0])
    dx, ds, dz = _gradients(x, scale, zero_point, None, NO_AXIS, weights)
    local_x, local_s, local_z = _formula(x, scale, zero_point)
    assert 0 < local_x.mean() < 1  # both cases are there
    assert torch.equal(dx, weights * local_x)
    # sums of 60 FP32 terms in another order
    torch.testing.assert_close(ds, (weights * local_s).sum().reshape(1))
    torch.testing.assert_close(dz, (weights * local_z).sum().reshape(1))


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_per_channel(x: Tensor, weights: Tensor, axis: int) -> None:
    count = x.shape[axis]
    scale, zero_point = torch.linspace(0.1, 0.5, count)[None], torch.zeros(1, count)
    dx, ds, dz = _gradients(x, scale, zero_point, None, axis, weights)
    shape = [count if dim == axis else 1 for dim in range(3)]
    others = [dim for dim in range(3) if dim != axis]
    local_x, local_s, local_z = _formula(x, scale.reshape(shape), zero_point.reshape(shape))
    assert torch.equal(dx, weights * local_x)
    torch.testing.assert_close(ds[0], (weights * local_s).sum(dim=others))
    torch.testing.assert_close(dz[0], (weights * local_z).sum(dim=others))


def test_gradients_reach_only_the_rows_in_use(x: Tensor, weights: Tensor) -> None:
    scale, zero_point = torch.tensor([0.2, 0.3, 0.4, 0.5]), torch.tensor([0.0, 1.0, -1.0, 2.0])
    row = torch.tensor([2, 0, 2])
    _, ds, dz = _gradients(x, scale, zero_point, row, NO_AXIS, weights)
    _, local_s, local_z = _formula(x, scale[row][:, None, None], zero_point[row][:, None, None])
    for table, local in ((ds, local_s), (dz, local_z)):
        per_sample = (weights * local).sum(dim=(1, 2))
        torch.testing.assert_close(table[2], per_sample[0] + per_sample[2])
        torch.testing.assert_close(table[0], per_sample[1])
        assert table[1] == 0
        assert table[3] == 0


def test_one_row_for_all_samples(x: Tensor, weights: Tensor) -> None:
    scale, zero_point = torch.tensor([0.2, 0.3]), torch.tensor([0.0, 1.0])
    _, by_row, _ = _gradients(x, scale, zero_point, torch.tensor([1]), NO_AXIS, weights)
    _, alone, _ = _gradients(x, scale[1:], zero_point[1:], None, NO_AXIS, weights)
    assert by_row[0] == 0
    torch.testing.assert_close(by_row[1:], alone)


def test_scalar_row_equals_per_sample_gather(x: Tensor) -> None:
    scale, zero_point = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.0, 1.0, -1.0])
    rows = torch.tensor([2, 0, 1])
    mixed = fake_quantize(x, scale, zero_point, rows, QMIN, QMAX, NO_AXIS)
    for sample, row in enumerate(rows):
        alone = fake_quantize(x[sample : sample + 1], scale, zero_point, row[None], QMIN, QMAX, NO_AXIS)
        assert torch.equal(mixed[sample : sample + 1], alone)


def test_per_channel_rows() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(5, 3, generator=torch.Generator().manual_seed(3)) + 0.1
    row = torch.tensor([4, 1])
    y = fake_quantize(x, scale, torch.zeros_like(scale), row, QMIN, QMAX, 1)
    expected = fake_quantize_reference(x, scale[row][:, :, None], torch.zeros(1), QMIN, QMAX)
    assert torch.equal(y, expected)


def test_no_gradient_is_computed_where_none_is_wanted(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    scale, zero_point = torch.tensor([0.3]), torch.tensor([0.0])
    fake_quantize(leaf, scale, zero_point, None, QMIN, QMAX, NO_AXIS).sum().backward()
    assert leaf.grad is not None
    assert scale.grad is None


def test_operator_keeps_its_contract_with_torch() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    scale = torch.tensor([0.2, 0.4], requires_grad=True)
    arguments = (x, scale, torch.zeros(2), torch.tensor([1, 0]), QMIN, QMAX, NO_AXIS)
    torch.library.opcheck(fake_quantize, arguments)
