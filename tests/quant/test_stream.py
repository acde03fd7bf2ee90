"""Safetensors files written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from qdexport.quant.stream import LazyTensor, write_safetensors


def _lazy(array: np.ndarray) -> LazyTensor:
    return LazyTensor(dtype=array.dtype, shape=array.shape, make=lambda: array)


def test_what_the_library_reads_is_what_was_given(tmp_path: Path) -> None:
    arrays = {
        "b.codes": np.arange(-3, 4, dtype=np.int8),  # an odd number of bytes before the next
        "a.codes": np.arange(6, dtype=np.uint8).reshape(2, 3).T,  # not contiguous
        "z.scale": np.array([[0.5, 1.5]], dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: _lazy(array) for name, array in arrays.items()}, {"note": 'quo"te é'})
    loaded = load_file(path)
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"note": 'quo"te é'}


def test_a_tensor_that_is_not_as_announced(tmp_path: Path) -> None:
    tensor = LazyTensor(dtype=np.dtype(np.int8), shape=(3,), make=lambda: np.zeros(4, np.int8))
    with pytest.raises(ValueError, match="announced as int8"):
        write_safetensors(tmp_path / "x.safetensors", {"codes": tensor}, {})
