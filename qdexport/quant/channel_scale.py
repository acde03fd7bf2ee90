"""Timestep-channel joint reparameterization (TCAQ-DM): one factor per input channel, from ranges over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdexport.core.spec import QuantSpec
from qdexport.quant.observers import NonFiniteError, RangeObserver

__all__ = ["ChannelObserver", "cut_off", "cut_offs", "grouped_peaks", "joint_ratio"]

# a dead channel must not make every other factor infinite (methods.md 4.4)
_SMALLEST_PEAK = 1e-5


class ChannelObserver(RangeObserver):
    """The range of every channel of one tensor, per row.

    Args:
        rows: steps, or groups of them.
        axis: of the channels: 1 for images, -1 for tokens.
    """

    def __init__(self, rows: int, axis: int) -> None:
        super().__init__(rows)
        self.axis = axis
        self.channel_low = torch.zeros(0)
        self.channel_high = torch.zeros(0)

    def _record(self, row: int, x: Tensor, low: float, high: float) -> None:
        super()._record(row, x, low, high)
        ends = torch.aminmax(x.movedim(self.axis, 0).flatten(1), dim=1)
        if not len(self.channel_low):
            shape = (len(self.low), x.shape[self.axis])
            self.channel_low, self.channel_high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        self.channel_low[row] = torch.minimum(self.channel_low[row], ends.min.float().cpu())
        self.channel_high[row] = torch.maximum(self.channel_high[row], ends.max.float().cpu())

    @property
    def peaks(self) -> Tensor:
        """``p_t[j] = max |x_t[:, j]|``, FP32 ``[rows, C]``."""
        return torch.maximum(-self.channel_low, self.channel_high).clamp(min=0)

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low.clone(), self.high.clone()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"channel_low": self.channel_low, "channel_high": self.channel_high}

    def load_state(self, state: dict[str, Tensor]) -> None:
        shape = state["channel_low"].shape
        if len(shape) != 2 or shape[0] != len(self.low):
            raise ValueError(f"channel_low is {list(shape)}, expected {len(self.low)} rows")
        self.channel_low, self.channel_high = torch.empty(shape), torch.empty(shape)
        super().load_state(state)


def joint_ratio(peaks: Tensor) -> Tensor:
    """``r[j] = sum_t p_t[j] r_t[j] / sum_t p_t[j]`` with ``r_t[j] = p_t[j] / min_j p_t[j]`` (TCAQ-DM, eqs. 3 to 5).

    Args:
        peaks: ``p_t[j] = max |x_t[:, j]|``, ``[groups of steps, C]``.

    Returns:
        ``r``, FP32 ``[C]``, at least 1, not cut off.

    Raises:
        NonFiniteError: a peak is NaN or infinite.
    """
    if not bool(torch.isfinite(peaks).all()):
        raise NonFiniteError("a channel's range is NaN or infinite")
    p = peaks.double()
    largest = p.amax(dim=1, keepdim=True)
    p = torch.maximum(p, largest * _SMALLEST_PEAK)
    p = torch.where(largest > 0, p, 1.0)  # a step in which nothing is seen moves nothing
    per_step = p / p.amin(dim=1, keepdim=True)
    return ((p * per_step).sum(dim=0) / p.sum(dim=0)).clamp(min=1).float()


def cut_off(ratio: Tensor, limit: float, *, power_of_two: bool) -> Tensor:
    """``clamp(r, 1, R_trunc)``; rounded to powers of two on request, which no floating-point product rounds."""
    cut = ratio.clamp(1, limit)
    return torch.exp2(torch.log2(cut).round()) if power_of_two else cut


def cut_offs(limit: float, factor: float = 1.5) -> list[float]:
    """Values of ``R_trunc`` that are tried: from 1 (no change) to ``limit``, each ``factor`` times the one before."""
    tried = [1.0]
    while tried[-1] * factor < limit:
        tried.append(tried[-1] * factor)
    return [*tried, limit]


def grouped_peaks(peaks: Tensor, group_of_step: Sequence[int]) -> Tensor:
    """Peaks of groups of steps, ``[groups, C]``, from those of single steps."""
    groups = max(group_of_step) + 1
    index = torch.tensor(group_of_step)
    return torch.stack([peaks[index == group].amax(dim=0) for group in range(groups)])
