"""Streaming observers: the range of an activation, per tensor and per row of a step table.

An observer's state does not depend on the width, sign or symmetry of the quantizer; those come in only when a
range is asked for. State is a flat dictionary of tensors, so that an interrupted calibration goes on where it
was saved.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qdexport.core.spec import ObserverSpec, QuantSpec
from qdexport.quant.search import Histogram, histogram_range_of_least_error

__all__ = ["HistogramObserver", "NonFiniteError", "RangeObserver", "make_observer"]


class NonFiniteError(ValueError):
    """An observed tensor holds NaN or infinity."""


# how much the steps before and after count in a step's own row: neighbours are alike, and a row alone sees as many
# times fewer values than a static one as there are steps (docs/quality.md)
_NEIGHBOURS = (0.7, 0.4)


class RangeObserver(ABC):
    """Watches one tensor over a calibration run.

    Args:
        rows: rows of the step table; 1 is a static range.

    Attributes:
        low: the smallest value seen, float64 ``[rows]``; infinity where nothing was seen.
        high: the largest value seen, float64 ``[rows]``; minus infinity where nothing was seen.
    """

    def __init__(self, rows: int) -> None:
        self.low = torch.full((rows,), torch.inf, dtype=torch.float64)
        self.high = torch.full((rows,), -torch.inf, dtype=torch.float64)

    @property
    def missing_rows(self) -> list[int]:
        """Rows for which nothing was observed."""
        return torch.nonzero(self.low > self.high).flatten().tolist()

    def update(self, row: int, x: Tensor) -> None:
        """Takes one more tensor of any floating dtype and shape into account.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity; nothing was recorded.
        """
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NonFiniteError(f"values from {low} to {high}")
        self._record(row, x.detach(), low, high)

    def _record(self, row: int, x: Tensor, low: float, high: float) -> None:
        self.low[row] = min(float(self.low[row]), low)
        self.high[row] = max(float(self.high[row]), high)

    def end_batch(self) -> None:  # noqa: B027  most observers have nothing to do here
        """Marks the end of one batch of prompts (all its steps)."""

    def merged(self, group_of_row: Sequence[int]) -> RangeObserver:
        """An observer of groups of rows, from what was seen of the single rows; this one stays as it is.

        Counts add up; of ends, and of moving averages of ends, a group takes the widest of its rows.
        """
        joined = copy.copy(self)
        for name, tensor in self.state().items():
            setattr(joined, name, _join(name, tensor, group_of_row))
        return joined

    def pooled(self) -> RangeObserver:
        """An observer of successive steps in which every row also counts what its neighbours saw; this one stays as it
        is. Ranges of extreme values are left alone.
        """
        return self

    @abstractmethod
    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Low and high for a quantizer, float64 ``[rows]``; defined only for rows that are not missing."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that describe what was seen up to the last end of a batch."""
        return {"low": self.low, "high": self.high}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from a saved state. Raises ``KeyError`` or ``ValueError`` when it is of another
        observer.
        """
        for name, tensor in self.state().items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise ValueError(f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_(state[name])


def _join(name: str, tensor: Tensor, group_of_row: Sequence[int]) -> Tensor:
    """Rows of one group become one: the least of what ends in ``low``, the largest of ``high``, else their sum."""
    index = torch.tensor(group_of_row)
    rows = [tensor[index == group] for group in range(max(group_of_row) + 1)]
    if name.endswith("low"):
        return torch.stack([part.amin(dim=0) for part in rows])
    if name.endswith("high"):
        return torch.stack([part.amax(dim=0) for part in rows])
    return torch.stack([part.sum(dim=0) for part in rows])


class MinMaxObserver(RangeObserver):
    """The smallest and the largest value."""

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low.clone(), self.high.clone()


class EmaMinMaxObserver(RangeObserver):
    """Exponential moving average of the smallest and largest value of each batch of prompts.

    The average moves once per batch, whatever the number of denoiser calls in it and whoever asks for a range
    (methods.md 2.4: MixDQ's code moves it once per requested width).
    """

    def __init__(self, rows: int, momentum: float) -> None:
        super().__init__(rows)
        self.momentum = momentum
        self.average_low = torch.full((rows,), torch.nan, dtype=torch.float64)
        self.average_high = torch.full((rows,), torch.nan, dtype=torch.float64)
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._batch_low = torch.full_like(self.low, torch.inf)
        self._batch_high = torch.full_like(self.high, -torch.inf)

    def _record(self, row: int, x: Tensor, low: float, high: float) -> None:
        super()._record(row, x, low, high)
        self._batch_low[row] = min(float(self._batch_low[row]), low)
        self._batch_high[row] = max(float(self._batch_high[row]), high)

    def end_batch(self) -> None:
        seen = self._batch_low <= self._batch_high
        first = seen & self.average_low.isnan()
        for average, batch in ((self.average_low, self._batch_low), (self.average_high, self._batch_high)):
            moved = self.momentum * average + (1 - self.momentum) * batch
            average.copy_(torch.where(first, batch, torch.where(seen, moved, average)))
        self._forget_batch()

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.average_low.clone(), self.average_high.clone()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"average_low": self.average_low, "average_high": self.average_high}


class HistogramObserver(RangeObserver):
    """Counts all values in fixed bins.

    The bins have equal relative width (32 per octave, from 2^-24 to 2^24, for either sign), read off the bits of FP32,
    so that histograms of any two runs, or of any two rows, add up exactly, and nothing depends on chance.
    """

    _MANTISSA_BITS = 5
    _LOWEST_EXPONENT, _HIGHEST_EXPONENT = -24, 24

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self._shift = 23 - self._MANTISSA_BITS
        self._base = (127 + self._LOWEST_EXPONENT) << self._MANTISSA_BITS
        self._bins = (self._HIGHEST_EXPONENT - self._LOWEST_EXPONENT) << self._MANTISSA_BITS
        # [negative bins, largest magnitude first | values below 2^-24 | positive bins]
        self.counts = torch.zeros((rows, 2 * self._bins + 1), dtype=torch.int64)
        keys = np.arange(self._base, self._base + self._bins + 1, dtype=np.int32)
        magnitude = (keys << self._shift).view(np.float32).astype(np.float64)
        self._edges = np.concatenate([-magnitude[::-1], magnitude])

    def _record(self, row: int, x: Tensor, low: float, high: float) -> None:
        super()._record(row, x, low, high)
        bits = x.float().contiguous().view(torch.int32).flatten()
        index = ((bits & 0x7FFFFFFF) >> self._shift).sub_(self._base - 1).clamp_(0, self._bins)
        index = torch.where(bits < 0, -index, index).add_(self._bins)
        self.counts[row] += torch.bincount(index, minlength=self.counts.shape[1]).cpu()

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low.clone(), self.high.clone()

    def histogram(self, row: int) -> Histogram:
        """What was counted in a row."""
        edges = torch.from_numpy(self._edges)
        used = torch.nonzero(self.counts[row]).flatten()
        return Histogram(
            middle=((edges[:-1] + edges[1:]) / 2)[used],
            width=edges.diff()[used],
            count=self.counts[row][used].double(),
        )

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"counts": self.counts}


class PercentileObserver(HistogramObserver):
    """The range that keeps a share of all values, half of the rest beyond either end; off by at most one bin."""

    def __init__(self, rows: int, percentile: float) -> None:
        super().__init__(rows)
        self.percentile = percentile

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        tail = (1 - self.percentile / 100) / 2
        low, high = self.low.clone(), self.high.clone()
        for row in range(self.counts.shape[0]):
            cumulative = np.concatenate([[0], np.cumsum(self.counts[row].numpy())]).astype(np.float64)
            smallest, largest = float(low[row]), float(high[row])
            edges = self._edges.copy()  # the outermost bins hold everything beyond 2^24
            edges[0], edges[-1] = min(edges[0], smallest), max(edges[-1], largest)
            ends = np.interp(np.array([tail, 1 - tail]) * cumulative[-1], cumulative, edges)
            low[row], high[row] = np.clip(ends, smallest, largest)
        return low, high


class MseObserver(HistogramObserver):
    """The range of least quantization error, over all values.

    A sample does not do: with a row per step, rows searched on some thousand values clip tails that the sample missed,
    and were worse than one static row (docs/quality.md).
    """

    def pooled(self) -> RangeObserver:
        joined = copy.copy(self)
        counts, rows = self.counts.double(), len(self.low)
        joined.counts, joined.low, joined.high = counts.clone(), self.low.clone(), self.high.clone()
        for distance, share in enumerate(_NEIGHBOURS, 1):
            if distance >= rows:
                break
            for here, there in ((slice(distance, None), slice(-distance)), (slice(-distance), slice(distance, None))):
                joined.counts[here] += share * counts[there]
                joined.low[here] = torch.minimum(joined.low[here], self.low[there])
                joined.high[here] = torch.maximum(joined.high[here], self.high[there])
        return joined

    def ranges(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        low, high = self.low.clone(), self.high.clone()
        for row in range(low.shape[0]):
            ends = float(low[row]), float(high[row])
            low[row], high[row] = histogram_range_of_least_error(self.histogram(row), *ends, spec)
        return low, high


def make_observer(spec: ObserverSpec, rows: int) -> RangeObserver:
    """Makes the observer that a recipe asks for.

    Args:
        spec: kind and parameters.
        rows: rows of the step table.
    """
    match spec.kind:
        case "minmax":
            return MinMaxObserver(rows)
        case "ema_minmax":
            return EmaMinMaxObserver(rows, spec.momentum)
        case "percentile":
            return PercentileObserver(rows, spec.percentile)
        case "mse":
            return MseObserver(rows)
