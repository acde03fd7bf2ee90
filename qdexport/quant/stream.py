"""Writes safetensors files tensor by tensor, so that the codes of a large model are never in memory all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LazyTensor", "write_safetensors"]

_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor whose type and shape are known before its values are made.

    Attributes:
        dtype: float32, int8 or uint8.
        shape: of the array.
        make: computes the array; called once, while the file is written.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: an 8-byte little-endian length, a JSON header, then the arrays without gaps.

    Args:
        path: is replaced; write to a temporary name for an atomic result.
        tensors: by name; wider types come first in the file, so that every array is aligned.
        metadata: text entries of the header.

    Raises:
        ValueError: an array is not of the type and shape that was announced.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            # not tofile: it counts the bytes that arrived and does not say why they are too few
            file.write(_checked(name, tensors[name]).reshape(-1).view(np.uint8).data)


def _checked(name: str, tensor: LazyTensor) -> NDArray[Any]:
    array = np.ascontiguousarray(tensor.make())
    if array.dtype != tensor.dtype or array.shape != tensor.shape:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, announced as {tensor.dtype} {tensor.shape}")
    return array
