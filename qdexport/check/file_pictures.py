"""Pictures that ONNX Runtime samples with the file, beside those of the fake-quant model from the same noise.

They are two roundings of one network. A code that falls the other way travels on, until the two are as far from each
other as two unrelated roundings would be: each is one quantization error away from the floating-point picture, so that
the square of their distance is twice that of the error. A file that is further off is another network.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from qdexport.check.pictures import INVISIBLE, image_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["picture_problems"]

_UNRELATED: Final = 2.0
# the square of a distance of single pictures scatters by a factor of e (one standard deviation), and the mean over n by
# the n-th root of that, squared; three of those, and never less than twice what unrelated roundings are apart
_DEVIATIONS: Final = 3.0
_LEAST: Final = 4.0


def picture_problems(images: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """What is wrong with the file's pictures; nothing where they, or the model's own, are missing.

    Args:
        images: ``[N, C, H, W]`` each of ``fp``, ``quantized`` and ``onnx``, of the same prompts and noise.
    """
    if not {"fp", "quantized", "onnx"} <= images.keys():
        return []
    fp, quantized, onnx = images["fp"], images["quantized"], images["onnx"]
    if not (np.isfinite(fp).all() and np.isfinite(quantized).all()):
        return []  # the model's own pictures are no measure
    bad = int((~np.isfinite(onnx)).reshape(len(onnx), -1).any(axis=1).sum())
    if bad:
        return [f"{bad} of {len(onnx)} pictures of the ONNX file hold NaN or infinity; the fake-quant model's do not"]
    # roots, so that one picture in which a thing has moved does not decide alone
    apart, error = (np.sqrt(image_errors(a, b)).mean() ** 2 for a, b in ((onnx, quantized), (quantized, fp)))
    limit = max(_LEAST, _UNRELATED * math.exp(_DEVIATIONS / math.sqrt(len(onnx))))
    ratio = float(apart / max(error, INVISIBLE))
    if ratio <= limit:
        return []
    problem = (
        f"the pictures of the ONNX file are {ratio:.1f} times as far (squared) from those of the fake-quant model as "
        f"quantization takes these from the floating-point ones, more than {limit:.1f}: two roundings of one network "
        f"are {_UNRELATED:g} times as far"
    )
    return [problem]
