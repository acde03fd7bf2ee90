"""Writes the large constants of a model to a file beside it: one tensor in memory at a time, without gaps or copies."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["write_external"]


def write_external(values: Iterable[ir.Value], folder: Path, name: str) -> dict[ir.Value, ir.ExternalTensor]:
    """Writes constants one behind the other, wider element types first, so that each is aligned to its own elements.

    Equal constants are written once. (onnx_ir's own writer begins large tensors at multiples of the page size; nothing
    that reads our files needs that.)

    Args:
        values: constants; their tensors may be computed when they are asked for.
        folder: of the model file.
        name: of the file to write in it.

    Returns:
        What stands for each constant in the model file.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {value: value.const_value for value in values if value.const_value is not None}
    order = sorted(tensors, key=lambda value: -tensors[value].dtype.bitwidth)
    places: dict[tuple[int, bytes], int] = {}
    stored: dict[ir.Value, ir.ExternalTensor] = {}
    with (folder / name).open("wb") as stream:
        for value in order:
            tensor = tensors[value]
            data = tensor.tobytes()
            key = len(data), hashlib.blake2b(data).digest()
            if key not in places:
                places[key] = stream.tell()
                stream.write(data)
            stored[value] = ir.ExternalTensor(
                name,
                places[key],
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
    return stored
