"""Recognises a network that was never trained: its pictures are noise, whatever its numbers are."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["is_untrained"]

_FEWEST: Final = 256  # values of a weight from which its moments say something
_FEWEST_ROWS: Final = 32  # of a sample variance, whose tails are long below
_MOST: Final = 65_536  # values that are looked at of one weight
# in standard errors; a large network takes some thousand such tests, of which draws fail one in a million
_DEVIATIONS: Final = 6.0
# the kurtosis k = m4 / m2^2 of what weights are drawn from, and n times the variance of its estimate from n draws:
# (m8 - m4^2) + 4 k^2 (m4 - 1) - 4 k (m6 - m4) with m2 = 1
_NORMAL: Final = (3.0, 24.0)
_UNIFORM: Final = (1.8, 1.32)


def is_untrained(network: nn.Module) -> bool:
    """Whether every weight of a network still is what an initializer draws.

    True only when both hold. The factors of every normalization are exactly one and its offsets exactly zero (a step
    of training moves them; there may be none). And the values of every weight are independent draws of mean zero from
    one uniform or one normal distribution: their mean, their kurtosis, and how much the norms of its rows and columns
    differ lie within six standard errors. Trained rows differ by far more, so that a trained network never passes with
    all of its layers.

    Args:
        network: in any floating-point type.
    """
    if not all(_as_made(module) for module in network.modules() if "norm" in type(module).__name__.lower()):
        return False
    weights = [
        module.weight.detach()
        for module in network.modules()
        if isinstance(module, nn.Linear | _ConvNd) and module.weight.numel() >= _FEWEST
    ]
    drawn = [_looks_drawn(weight) for weight in weights if bool(weight.any())]  # zeros are an initializer's, too
    return bool(drawn) and all(drawn)


def _as_made(norm: nn.Module) -> bool:
    own = dict(norm.named_parameters(recurse=False))
    factors = [bool((item == 1).all()) for name, item in own.items() if name == "weight" and item.dim() == 1]
    offsets = [bool((item == 0).all()) for name, item in own.items() if name == "bias"]
    return all([*factors, *offsets])


def _looks_drawn(weight: Tensor) -> bool:
    rows = weight.reshape(weight.shape[0], -1)
    values = rows[: max(1, _MOST // rows.shape[1]), :_MOST].double()
    count, variance = values.numel(), float(values.square().mean())
    if not abs(float(values.mean())) <= _DEVIATIONS * math.sqrt(variance / count):  # so that NaN is no draw
        return False
    kurtosis = float(values.pow(4).mean()) / variance**2
    return any(
        abs(kurtosis - expected) <= _DEVIATIONS * math.sqrt(spread / count)
        and all(_even(part.square().sum(1), part.shape[1], variance, expected) for part in (values, values.T))
        for expected, spread in (_NORMAL, _UNIFORM)
    )


def _even(sums: Tensor, length: int, variance: float, kurtosis: float) -> bool:
    """Whether sums of ``length`` squares differ from one another as those of independent draws do."""
    if sums.numel() < _FEWEST_ROWS:
        return True
    found = float((sums - length * variance).square().mean())
    expected = length * (kurtosis - 1) * variance**2
    # the sums' own kurtosis less one: 2 for a normal sum; squares of normal draws have 12 more than that, over length
    error = math.sqrt((2 + 12 / length) / sums.numel())
    return abs(found / expected - 1) <= _DEVIATIONS * error
