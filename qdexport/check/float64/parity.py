"""Whether the ONNX file and the fake-quant model are one function, but for roundings: the verdict's main evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import onnx_ir as ir
import psutil
from torch import nn

from qdexport.check.calls import fit_inputs
from qdexport.check.float64.graph import SCALE_ROUNDINGS, attention_scales
from qdexport.check.float64.network import Difference, Float64Network, Tolerances
from qdexport.check.float64.ops import UnsupportedError
from qdexport.check.float64.tables import check_tables
from qdexport.check.shapes import ShapePoint
from qdexport.core.io_spec import IoSpec
from qdexport.core.network_facts import NetworkFacts
from qdexport.core.results import Float64Parity
from qdexport.errors import ParityError
from qdexport.graph.dimension import size_of
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.attach import QuantizedModel

__all__ = ["TOLERANCES", "float64_parity", "largest_bytes"]

OnProgress = Callable[[int, int], None]

# Of an element, relative to itself and the tensor's mean size (compare.distance), behind what the rounding of a stored
# number to FP16 may be off by (halves.py).
# tensor: FP32 constants that a pass rounds anew are off by 2^-24, and a sum of a few of them by some 1e-7. FP16 ones
# are PyTorch's own parameters, or exactly roundings of numbers that are executed in their place: no body needs more. A
# wrong constant is off by its own error, some 1e-2.
# timestep: frequencies of an embedding are FP32, and two exponential functions differ in the last place: 2^-24 times a
# timestep of 1000 is a phase of 6e-5, which two layers may multiply.
# early: the same of any number that is put into sines, guidance times 1000 among them.
# tabled: rows of an FP16 table that were not found in PyTorch are off by 2^-12 each, and a norm may multiply that.
TOLERANCES: Final = {
    "fp32": Tolerances(tensor=4e-6, timestep=5e-4, early=2e-3, tabled=5e-4),
    "fp16": Tolerances(tensor=4e-6, timestep=5e-4, early=2e-3, tabled=1e-3),
}
# one call of a network of this size takes a minute on two cores; whatever depends on the step is compared apart
_LARGE_PARAMETERS: Final = 200_000_000
_AT_ONCE: Final = 5  # tensors of the largest size: both sides, before and after an operator, and a difference
_EPSILON_ROUNDING: Final = 1e-6
_NORMS: Final = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"})
_NAMED: Final = 16  # one of them is the place: few layers lie between two that are quantized


def float64_parity(
    model: QuantizedModel,
    onnx_path: Path,
    facts: NetworkFacts,
    calls: Sequence[DenoiserCall],
    shapes: Sequence[tuple[ShapePoint, DenoiserCall]] = (),
    on_progress: OnProgress | None = None,
) -> Float64Parity:
    """Compares constants and tables, all rows, and whole denoiser calls tensor by tensor.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file.
        facts: what it says about itself.
        calls: denoiser calls; a large network takes the first of them alone.
        shapes: calls at other sizes (:func:`qdexport.check.shapes.calls_at_shapes`).
        on_progress: called with the work done and its total.

    Returns:
        What was compared, and a sentence for each thing that differs. An operator that cannot be executed here is a
        note.

    Raises:
        ParityError: a layer is not quantized in the file.
        ModelError: there is no such file.
    """
    network = Float64Network(model, onnx_path, facts.io, TOLERANCES[model.body])
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    inputs = [fit_inputs(call.inputs, facts.io) for call in calls[: 1 if size > _LARGE_PARAMETERS else None]]
    work = [("", item) for item in inputs] + [(str(point), call.inputs) for point, call in shapes]
    needed, free = largest_bytes(network.graph, facts.io), int(psutil.virtual_memory().available)
    total = len(work) + 1
    result = Float64Parity(calls=0, tensors=0, sqnr_db=float("inf"))
    result.problems += _constants(network, model.denoiser)
    try:
        tables = check_tables(network, model, facts, inputs[0])
        result.rows, result.notes = tables.rows, tables.notes
        result.problems += tables.problems
        network.pairings = tables.pairings
        if needed > free:
            result.notes.append(
                f"whole calls in float64 need some {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} GB are "
                "free: tables and constants were compared in float64, layers in ONNX Runtime alone"
            )
            work = []
        for done, (label, call) in enumerate(work):
            if on_progress is not None:
                on_progress(done + 1, total)
            network.call(call, label)
            result.calls += 1
    except UnsupportedError as error:
        result.notes.append(f"{error}; layers are compared in ONNX Runtime alone")
    except ParityError as error:
        result.problems.append(str(error))
    if on_progress is not None:
        on_progress(total, total)
    result.tensors, result.sqnr_db = network.seen.tensors, network.seen.least_db
    result.problems += _sentences(network.seen.differences)
    return result


def largest_bytes(graph: ir.Model, io: IoSpec) -> int:
    """What the largest tensors of a call take in float64: the probabilities of attention, mostly."""
    sizes = {dim.name: dim.high for dim in io.dynamic_dims}
    largest = 0
    for node in graph.graph:
        for value in node.outputs:
            dims = [size_of(dim, sizes) for dim in value.shape or ()]
            largest = max(largest, math.prod(1 if size is None else size for size in dims))
    return _AT_ONCE * 8 * largest


def _sentences(differences: Sequence[Difference]) -> list[str]:
    """One sentence for each place, by its worst call, in the order of execution."""
    worst: dict[tuple[str, str], Difference] = {}
    for item in differences:
        known = worst.setdefault((item.place, item.what), item)
        if item.found.worst > known.found.worst:
            worst[item.place, item.what] = item
    return [f"{item.call}: {_sentence(item)}" if item.call else _sentence(item) for item in worst.values()]


def _sentence(item: Difference) -> str:
    if item.what == "codes":
        return f"{item.place}: {item.found.worst:.2g} of the activation codes differ on equal inputs"
    distance = f"{item.found.sqnr_db:.1f} dB, an element by {item.found.worst:.2g}"
    if item.what == "shared":
        return f"{item.place}: it reads what another layer reads in the file, and other numbers in PyTorch"
    if item.what == "first token":
        return f"{item.place}: what it makes of the text's first token differs ({distance})"
    if item.what == "condition":
        return f"{item.place}: what it reads of the timestep or another condition differs ({distance})"
    if item.what == "output" and item.place in item.suspects:
        return f"{item.place}: its output differs on equal codes ({distance})"
    modules = [name for name in item.suspects if name] or ["the denoiser itself"]
    shown = ", ".join(modules[:_NAMED]) + (f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else "")
    what = "it" if item.what == "output" else f"what it reads ({item.what})"
    return f"{item.place}: {what} differs ({distance}), made by {shown}"


def _constants(network: Float64Network, denoiser: nn.Module) -> list[str]:
    """Numbers that are attributes in PyTorch: the scale of attention, and what norms add to a variance."""
    modules = dict(denoiser.named_modules())
    found = []
    for node, usual, stored, constants in attention_scales(network.graph):
        name = _module(node)
        own = getattr(modules.get(name), "scale", usual)
        own = own if isinstance(own, float) else usual
        # written in another way (a quotient), it is compared with the tensors
        if constants and all(abs(stored - right) > SCALE_ROUNDINGS * right for right in (usual, own)):
            found.append(f"{name}: attention is scaled by {stored:.6g}, in PyTorch by {own:.6g}")
    for node in network.graph.graph:
        name = _module(node)
        right = getattr(modules.get(name), "eps", None)
        epsilon = _epsilon(node)
        if isinstance(right, float) and epsilon is not None and abs(epsilon - right) > _EPSILON_ROUNDING * right:
            found.append(f"{name}: its epsilon is {epsilon:.6g}, in PyTorch {right:.6g}")
    return list(dict.fromkeys(found))


def _epsilon(node: ir.Node) -> float | None:
    attribute = node.attributes.get("epsilon")
    if node.op_type in _NORMS:
        return 1e-5 if attribute is None else attribute.as_float()
    if node.op_type != "Add" or not any(use.node.op_type == "Sqrt" for use in node.outputs[0].uses()):
        return None
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return float(constants[0].numpy().reshape(-1)[0]) if len(constants) == 1 and constants[0].size == 1 else None


def _module(node: ir.Node) -> str:
    return (node.name or "").rpartition("/")[0]
