"""Reads what an emitted network says about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdexport.core.companion_facts import CompanionFacts
from qdexport.core.network_facts import NetworkFacts
from qdexport.emit.inspect import load_onnx

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_companion_facts", "read_network_facts"]


def read_network_facts(path: Path) -> NetworkFacts:
    """The facts in an ONNX file's metadata.

    Raises:
        ModelError: the file is absent, no ONNX file, or was not written by qdexport.
    """
    return NetworkFacts.from_metadata(load_onnx(path).metadata_props, str(path))


def read_companion_facts(path: Path) -> CompanionFacts:
    """The facts in the metadata of a text encoder's or a VAE decoder's ONNX file.

    Raises:
        ModelError: the file is absent, no ONNX file, or is none of these.
    """
    return CompanionFacts.from_metadata(load_onnx(path).metadata_props, str(path))
