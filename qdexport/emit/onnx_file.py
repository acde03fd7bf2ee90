"""Writes the lowered graph as an ONNX file, whole or not at all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qdexport import __version__
from qdexport.core.files import atomic_dir
from qdexport.core.writing import output_errors
from qdexport.emit.external import write_external
from qdexport.emit.legal import check_legal
from qdexport.errors import EmitError
from qdexport.graph.dialect import DOMAIN, FORM_KEY, LAYER_KEY
from qdexport.graph.edit import name_everything
from qdexport.graph.nvfp4 import NVFP4_OPSET, declare_nvfp4, has_nvfp4

if TYPE_CHECKING:
    from qdexport.core.files import Owner
    from qdexport.core.target import Target

__all__ = ["MODEL_FILE", "OnnxFile", "emit"]

logger = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# the ones that came with the opsets; older runtimes refuse newer numbers
_IR_VERSIONS = {20: 9, 21: 10, 22: 10, 23: 11}
# larger weights get a file of their own: protobuf would hold three copies of them (and ends at 2 GiB)
_SINGLE_FILE_BYTES = 64_000_000
_INLINE_BYTES = 256  # smaller constants stay in the file in any case
_FULL_CHECK_BYTES = 200_000_000  # shape inference of larger files costs more than it finds
_SHARED_ELEMENTS = 1 << 16  # equal constants of up to so many elements (zero points, sizes) become one


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """A finished file: its path, the bytes of file and external data together, and the number of nodes."""

    path: Path
    bytes: int
    nodes: int


def emit(
    model: ir.Model, folder: Path, target: Target, metadata: dict[str, str], owner: Owner | None = None
) -> OnnxFile:
    """Writes ``folder/model.onnx`` (and ``model.onnx.data`` for large weights), replacing the folder at once.

    Args:
        model: lowered; its opset number is set to the target's.
        folder: replaced as a whole when everything was written and checked.
        target: decides the opset.
        metadata: stored in the file's metadata.
        owner: knows which files of the folder are ours; None: all.

    Raises:
        EmitError: a node of the quantized dialect is left, a layer has what the target's opset or parser lacks, or
            onnx's checker finds the file illegal.
        OutputError: the folder cannot be written.
    """
    _finish(model, target, metadata)
    weight_bytes = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    with atomic_dir(folder, owner) as partial, output_errors(folder, weight_bytes):
        path = partial / MODEL_FILE
        if weight_bytes > _SINGLE_FILE_BYTES:
            _save_with_data(model, path)
        else:
            ir.save(model, path)
        _check(path, full=weight_bytes <= _FULL_CHECK_BYTES)
    files = (folder / name for name in (MODEL_FILE, DATA_FILE))
    size = sum(file.stat().st_size for file in files if file.is_file())
    logger.info("wrote %s, %.1f MB, %d nodes", folder / MODEL_FILE, size / 1e6, len(model.graph))
    return OnnxFile(path=folder / MODEL_FILE, bytes=size, nodes=len(model.graph))


def _save_with_data(model: ir.Model, path: Path) -> None:
    """Writes large constants to ``DATA_FILE``, but for whole numbers (sizes, axes, rows of a step): ONNX Runtime infers
    shapes from them, refuses the model when they are not in the file itself, and a network of real size has long lists.
    """
    large = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.INT64
        and value.const_value.nbytes > _INLINE_BYTES
    }
    try:
        for value, tensor in write_external(large, path.parent, DATA_FILE).items():
            value.const_value = tensor
        ir.save(model, path)
    finally:
        for value, original in large.items():
            value.const_value = original


def _finish(model: ir.Model, target: Target, metadata: dict[str, str]) -> None:
    left = [node.name for node in model.graph if node.domain == DOMAIN]
    if left:
        raise EmitError(f"{len(left)} nodes of the quantized dialect are left, the first is {left[0]}")
    common_passes.DeduplicateInitializersPass(size_limit=_SHARED_ELEMENTS)(model)
    name_everything(model)
    check_legal(model, target.with_opset(NVFP4_OPSET) if has_nvfp4(model) else target)
    for node in model.graph:
        # the module path is the first part of the node's name; stored twice it would only grow the file
        node.metadata_props.pop(LAYER_KEY, None)
        node.metadata_props.pop(FORM_KEY, None)
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = target.opset
    model.ir_version = _IR_VERSIONS[target.opset]
    if has_nvfp4(model):
        declare_nvfp4(model)
    model.producer_name = "qdexport"
    model.producer_version = __version__
    model.metadata_props.clear()
    model.metadata_props.update(metadata)


def _check(path: Path, *, full: bool) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EmitError(f"the emitted file is not legal ONNX: {str(error).splitlines()[0]}") from error
