"""Structural similarity of pictures of any size and any number of channels."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["structural_similarity"]

_RANGE: Final = 2.0  # pictures lie in [-1, 1]
_SIGMA: Final = 1.5  # of the window, whose edge of 11 pixels needs 6 pixels of the picture
_EDGE: Final = 6


def structural_similarity(first: NDArray[np.float32], second: NDArray[np.float32]) -> float | None:
    """Mean structural similarity (torchmetrics, Gaussian window of 11 x 11).

    Args:
        first: pictures ``[N, C, H, W]`` in [-1, 1].
        second: as many of the same size.

    Returns:
        None for pictures with fewer than 6 rows or columns, which are smaller than half a window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(first.shape[-2:]) < _EDGE:
        return None
    value = structural_similarity_index_measure(
        torch.from_numpy(first), torch.from_numpy(second), sigma=_SIGMA, data_range=_RANGE
    )
    return float(torch.as_tensor(value))
