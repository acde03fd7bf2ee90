"""From a fake-quant PyTorch denoiser to an ONNX graph of the quantized dialect, through torch.export."""

from __future__ import annotations

import contextlib
import copyreg
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import values
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from qdexport.capture.constants import crop_constants
from qdexport.capture.dimensions import fixed_dimensions, name_dimensions
from qdexport.capture.naming import name_nodes
from qdexport.core.writing import scratch_failure
from qdexport.errors import CaptureError
from qdexport.graph.dialect import CODE_FORMAT, DOMAIN, VERSION, register_schema
from qdexport.graph.edit import replace_value
from qdexport.models.denoiser_io import call_denoiser, example_inputs
from qdexport.models.rotary import exportable, out_of_range
from qdexport.quant import ops as _registered  # noqa: F401  the operator that is translated below

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qdexport.core.io_spec import IoSpec

__all__ = ["Captured", "capture", "capture_network"]

logger = logging.getLogger(__name__)

OPSET = 20  # what the exporter writes natively; emit raises the number, the operators in use are unchanged in 21
# constants that were folded twice are one again, so that a layer that is called twice on one input stays one layer;
# larger ones are not folded
_FOLDED_ELEMENTS = 8192
_ROUNDS = 2  # a rewritten node makes others constant
# The exporter's own optimizer also joins two Slices to a Split, for which it compares every node with all others: that
# alone takes as long as the rest of the export. Denoisers have no such pairs.
_RULES = (
    rules.mul_by_1_rule,
    *rules.mul_by_1_rule.commute(),
    rules.add_0_rule,
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
)
_CHATTERERS = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A graph in the quantized dialect, and its inputs and outputs; ``model`` is the only mutable part."""

    model: ir.Model
    io: IoSpec


class _NamedInputs(nn.Module):
    """Gives a denoiser of any signature the named inputs of an IoSpec."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        prediction = call_denoiser(self.denoiser, inputs)
        guard = out_of_range(inputs)
        return prediction if guard is None else prediction + guard.to(prediction.dtype)


def capture(denoiser: nn.Module, io: IoSpec) -> Captured:
    """Exports a denoiser on the CPU.

    Args:
        denoiser: the fake-quant module in eval mode, weights in the body's dtype.
        io: names, dtypes and shapes of inputs and outputs; ranges become dynamic dimensions.

    Returns:
        The graph with ``qdexport::FakeQuantize`` nodes; node names carry torch module paths.

    Raises:
        CaptureError: torch.export or the ONNX exporter cannot express the module.
    """
    register_schema()
    with exportable(denoiser):
        return capture_network(_NamedInputs(denoiser), "denoiser", io, example_inputs(_traced(io), seed=0))


def capture_network(caller: nn.Module, part: str, io: IoSpec, inputs: dict[str, Tensor]) -> Captured:
    """Exports any network on the CPU.

    Args:
        caller: takes the named inputs as one dictionary and returns the outputs in order.
        part: name of the network inside ``caller``; nodes get module paths that begin there.
        io: names, dtypes and shapes of inputs and outputs; ranges become dynamic dimensions.
        inputs: an example.

    Raises:
        CaptureError: torch.export or the ONNX exporter cannot express the module.
    """
    network = caller.get_submodule(part)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(caller, (inputs,), dynamic_shapes=_dynamic_shapes(io))
        except Exception as error:
            if (failure := scratch_failure(error)) is not None:
                raise failure from error
            fixed = fixed_dimensions(_first_line(error), io)
            advice = (
                f"; the model works at some sizes of {' and '.join(fixed)} only: give each one number, or another "
                "range, in the recipe's shapes"
                if fixed
                else ""
            )
            raise CaptureError(
                f"torch.export cannot trace {type(network).__name__}: {_first_line(error)}{advice}"
            ) from error
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table={torch.ops.qdexport.fake_quantize.default: _translate},
                input_names=[spec.name for spec in io.inputs],
                output_names=[spec.name for spec in io.outputs],
            )
        except torch.onnx.OnnxExporterError as error:
            raise CaptureError(f"the ONNX exporter cannot translate the model: {_first_line(error)}") from error
    if program is None:
        raise CaptureError("the ONNX exporter returned nothing")
    model: ir.Model = program.model
    with _quiet():
        _simplify(model)
        name_dimensions(model, io)
    lengths = {name: len(item) for name, item in network.named_modules() if isinstance(item, nn.ModuleList)}
    name_nodes(model, part, lengths)
    logger.info("captured %d nodes", len(model.graph))
    return Captured(model=model, io=io)


def _simplify(model: ir.Model) -> None:
    """Folds constants, drops what does nothing, merges neighbours and equal expressions."""
    common_passes.InlinePass()(model)
    _drop_idle_squeezes(model)
    for _ in range(_ROUNDS):
        fold_constants_ir(model, onnx_shape_inference=True, input_size_limit=_FOLDED_ELEMENTS)
        rewrite(model, _RULES)
    crop_constants(model, above=_FOLDED_ELEMENTS)
    for graph_pass in (
        common_passes.RemoveUnusedNodesPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.DeduplicateInitializersPass(size_limit=_FOLDED_ELEMENTS),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    ):
        graph_pass(model)


def _drop_idle_squeezes(model: ir.Model) -> None:
    """Removes Squeeze of an axis longer than 1: it does nothing in PyTorch, and is an error in ONNX."""
    for node in list(model.graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        data, axes = node.inputs
        if data is None or axes is None or data.shape is None:
            continue
        array = ir.convenience.get_const_tensor(axes)
        dims = [] if array is None else [data.shape[int(axis)] for axis in array.numpy().reshape(-1)]
        if dims and all(isinstance(dim, int) and dim != 1 for dim in dims):
            replace_value(node.outputs[0], data)
            model.graph.remove(node, safe=True)


def _translate(  # noqa: PLR0913  the signature of the operator
    x: Any, scale: Any, zero_point: Any, row: Any, qmin: int, qmax: int, axis: int, mode: Any = None, form: str = "int"
) -> Any:
    dialect = values.Opset(DOMAIN, VERSION)
    inputs = [x, scale, zero_point, row, mode]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = {"qmin": qmin, "qmax": qmax, "axis": axis}
    if form != "int":
        attributes[CODE_FORMAT] = form
    return dialect.FakeQuantize(*inputs, **attributes)


def _traced(io: IoSpec) -> IoSpec:
    """The inputs to trace with: at the best sizes, but no dynamic size is 1, which torch.export would fix."""
    return io.at({dim.name: dim.high for dim in io.dynamic_dims if dim.best == 1})


def _dynamic_shapes(io: IoSpec) -> tuple[dict[str, dict[int, Any] | None]] | None:
    """The ranges of an IoSpec in torch.export's form; dimensions of one name are one symbol."""
    symbols: dict[str, Any] = {}
    shapes: dict[str, dict[int, Any] | None] = {}
    for spec in io.inputs:
        dims = {}
        for axis, dim in enumerate(spec.dims):
            if dim.dynamic:
                # torch takes 0 and 1 for constants, so that 2 alone would be left of 1 to 2
                high = max(dim.high, 3)
                dims[axis] = symbols.setdefault(dim.name, torch.export.Dim.DYNAMIC(min=dim.low, max=high))
        shapes[spec.name] = dims or None
    return (shapes,) if symbols else None


def _first_line(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    shown = " ".join(line.strip(" -") for line in lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(cause).__name__}: {shown}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own chatter (torchvision absent, its deprecations, what it cannot fold) off the terminal."""
    loggers = [logging.getLogger(name) for name in _CHATTERERS]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=copyreg.__name__)
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)
