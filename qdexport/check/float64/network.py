"""The ONNX file and the fake-quant model side by side in float64, tensor by tensor.

In float64 nothing but codes is rounded, so that two right implementations agree to some 140 dB: what constants lose
that are rounded to FP32 once. To keep a code at a tie from falling the other way for that much, each stretch between
two quantizers reads what PyTorch read: when PyTorch reaches a layer, the file's tensor in front of the layer's
quantizer is compared with PyTorch's and then replaced by it, and likewise the layer's output. Codes are so equal,
without exception, and each difference is where it arises: in a layer, or between two of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qdexport.check.float64.alone import TABLES, Pairing
from qdexport.check.float64.compare import Distance, distance, fingerprint
from qdexport.check.float64.graph import Float64Graph, unrounded_numbers
from qdexport.check.float64.halves import stored_roundings, unrounded_quotients
from qdexport.check.float64.model import activation_codes, call_in_float64, float64_inputs
from qdexport.check.float64.ops import UnsupportedError
from qdexport.core.carrier import carrier_offset
from qdexport.core.io_spec import IoSpec
from qdexport.core.layer_names import layers_of
from qdexport.core.spec import LayerPlan
from qdexport.emit.inspect import load_onnx
from qdexport.errors import ParityError
from qdexport.graph.probe import LayerProbe, Probe, find_probes, find_softmax_probes
from qdexport.graph.query import scaled_for, sequence_first
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.modules import ActivationQuantizer, quantizer_pairs
from qdexport.quant.softmax import SoftmaxQuantizer

__all__ = ["Carried", "Difference", "Float64Network", "Seen", "Tolerances", "stored_codes"]

_SINES: Final = frozenset({"Sin", "Cos"})
_FIRST_TOKENS: Final = "bos_table"
_FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_OUTPUT: Final = "the prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """The largest distance of an element (:func:`qdexport.check.float64.compare.distance`) that is no difference.

    Attributes:
        tensor: of any tensor.
        timestep: of a row of the time table.
        early: of what is made of sines of the timestep and of other numbers.
        tabled: of what reads rows of a table that could not be taken from PyTorch, rounded to the body's type.
    """

    tensor: float
    timestep: float
    early: float
    tabled: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two tensors that should be equal and are not.

    Attributes:
        place: a layer, or ``the prediction``.
        what: ``input``, ``codes``, ``output``; ``condition`` for what is made of the timestep or another number alone,
            ``first token`` for what a layer makes of the text's first token, ``shared`` for a tensor that the file
            gives to two layers and PyTorch does not.
        found: how far they are apart; of codes, their share that differs is ``found.worst``.
        suspects: the modules whose operators lie between this tensor and the last ones that were equal.
        call: which call it was, where that is worth saying.
    """

    place: str
    what: str
    found: Distance
    suspects: tuple[str, ...] = ()
    call: str = ""


@dataclass(slots=True)
class Seen:
    """What one call or several showed.

    Attributes:
        tensors: how many were compared.
        least_db: the worst of them, but for those that are made of the timestep or other numbers alone.
        worst: the largest distance of an element.
        where: the tensor of ``worst``.
        differences: what is beyond the tolerance, in the order of execution.
    """

    tensors: int = 0
    least_db: float = float("inf")
    worst: float = 0.0
    where: str = ""
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A ``1 / r`` in some channels of a layer's output.

    Attributes:
        part: the channels.
        inverse: float64 ``[C]``.
        bias_rounding: what the bias lost when it was multiplied and rounded to its type again, float64 ``[C]``.
    """

    part: slice
    inverse: Tensor
    bias_rounding: Tensor


class Float64Network:
    """Compares denoiser calls.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file.
        io: its inputs.
        tolerances: what is no difference.

    Raises:
        ParityError: a layer is not quantized in the file.
        ModelError: there is no such file.
    """

    def __init__(self, model: QuantizedModel, onnx_path: Path, io: IoSpec, tolerances: Tolerances) -> None:
        self._model, self.tolerances = model, tolerances
        self.graph = load_onnx(onnx_path)
        self._plans = [plan for plan in model.plans if plan.quantizes_weight]
        parts = [part for plan in self._plans for part in plan.parts]
        alone = frozenset(plan.name for plan in self._plans if plan.weight_only)
        self.layers: dict[str, LayerProbe] = find_probes(self.graph, parts, alone)
        self._softmax = {
            name: module for name, module in model.denoiser.named_modules() if isinstance(module, SoftmaxQuantizer)
        }
        self.probes: dict[str, Probe] = {**self.layers, **find_softmax_probes(self.graph, list(self._softmax))}
        self._carried = _carried(self.layers, model.denoiser)
        self._unrounded = {
            **unrounded_numbers(self.graph),
            **unrounded_quotients(self.graph, model.denoiser, without=self._carried),
        }
        self.first_tokens = _first_tokens(self.graph)
        self.run = Float64Graph(self.graph, self._kept(), self._unrounded)
        self.pairings: list[Pairing] = []
        self._equal: dict[ir.Value, Any] = {}
        self._forced: set[ir.Value] = set()
        self._done: set[str] = set()
        self._label = ""
        self.seen = Seen()

    def graph_alone(self) -> Float64Graph:
        """Executes parts of the file beside the calls."""
        return Float64Graph(self.graph, unrounded=self._unrounded)

    def _kept(self) -> Iterator[ir.Value]:
        yield from self.first_tokens.values()
        for probe in self.probes.values():
            yield probe.x
            yield probe.y
            if probe.codes is not None:
                yield probe.codes

    def call(self, inputs: Mapping[str, Tensor], label: str = "") -> None:
        """Compares one call, whose inputs have the types and sizes of the file's; differences say its label.

        Raises:
            ParityError: an operator of the file cannot be executed.
        """
        self._equal, self._forced, self._done, self._label = {}, set(), set(), label
        wide = float64_inputs(inputs)
        self.run.start(wide)
        conditions = [item for pairing in self.pairings for item in self._conditions(pairing, wide)]
        self.run.start(wide)  # layers that lie before a condition have been executed on what the file makes itself
        for value, expected in conditions:
            self.run.force(value, expected)
            self._forced.add(value)
        with self._watched():
            prediction = call_in_float64(self._model.denoiser, inputs)
        for output in self.run.outputs[:1]:
            self._compare(_OUTPUT, "output", output, prediction)
        self.run.start({})

    def _conditions(self, pairing: Pairing, wide: Mapping[str, Tensor]) -> Iterator[tuple[ir.Value, Tensor]]:
        """What PyTorch makes of the timestep, for the file to read: what they may differ by is compared apart."""
        leaves = pairing.condition.values({name: wide[name] for name in pairing.condition.names})
        for value, fit in pairing.expected(leaves):
            found = self.run.value(value)
            expected = fit(found)
            reader = next(((use.node.name or "").rpartition("/")[0] for use in value.uses()), "")
            roundings = stored_roundings(value, scaled=pairing.values[value][1] is not None)
            apart = distance(expected, found, roundings)
            self._note(reader, "condition", apart, value, self.tolerances.early)
            yield value, expected
        self._forced.update(pairing.guards)  # 0, or NaN, which shows wherever it enters

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Hands the tensors of every planned layer over while the denoiser runs."""
        hooks = []
        for plan in self._plans:
            layer = self._model.denoiser.get_submodule(plan.name)
            hooks.append(layer.register_forward_hook(partial(self._take_layer, plan)))
        for name, quantizer in self._softmax.items():
            hooks.append(quantizer.register_forward_hook(partial(self._take_softmax, name)))
        for name, module in self._model.denoiser.named_modules():
            if name in self.first_tokens:
                hooks.append(module.register_forward_hook(partial(self._take_first_token, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take_layer(self, plan: LayerPlan, layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        if plan.name in self._done:
            return  # the graph has a layer once, although a network may call it twice on one input (DiT)
        self._done.add(plan.name)
        whole = not plan.splits and not plan.bos
        kernels = None if whole else layer.kernels()
        for index, operand in enumerate(layer.operands(args[0])):
            product = y if kernels is None else layer.product(index, operand, kernels[index])
            with _disable_current_modes():
                x = operand.to(torch.float64)
                self._layer(plan.parts[index], quantizer_pairs(layer)[index][0], x, product)

    def _take_softmax(self, name: str, quantizer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if name in self._done:
            return
        self._done.add(name)
        with _disable_current_modes():
            probe = self.probes[name]
            self._compare(name, "input", probe.x, args[0])
            self._compare(name, "output", probe.y, y)

    def _take_first_token(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        """Lets the file read PyTorch's projection of the first token; its own, rounded, is compared with the tables."""
        if name in self._done:
            return
        self._done.add(name)
        with _disable_current_modes():
            value, layer = self.first_tokens[name], name.rpartition(".")[0]
            expected = self.laid_out(layer, y[:, :1].to(torch.float64))
            apart = distance(expected, self.run.value(value), stored_roundings(value))
            self._note(layer, "first token", apart, value, self.tolerances.tabled)
            self.run.force(value, expected)
            self._forced.add(value)

    def _layer(self, name: str, quantizer: ActivationQuantizer | None, x: Tensor, y: Tensor) -> None:
        probe = self.layers[name]
        self._compare(name, "input", probe.x, self.laid_out(name, x, carried=False))
        if quantizer is not None and probe.codes is not None:
            codes = stored_codes(quantizer, x, probe.pads)
            self._compare_codes(name, probe.codes, self.laid_out(name, codes, carried=False))
        self._compare(name, "output", probe.y, self.stored_output(name, y), self.laid_out(name, y))

    def stored_output(self, name: str, y: Tensor) -> Tensor:
        """A layer's output with what the file's bias lost when it was rounded again."""
        return self.laid_out(name, y, rounded=True)

    def laid_out(self, name: str, tensor: Tensor, *, carried: bool = True, rounded: bool = False) -> Tensor:
        """A tensor of PyTorch's as the file has it: tokens first, and with the ``1 / r`` that the output carries."""
        probe = self.layers[name]
        for item in self.carried(name) if carried else ():
            tensor = tensor.clone()
            channels = tensor if probe.node.op_type != "Conv" else tensor.movedim(1, -1)
            channels[..., item.part] *= item.inverse
            channels[..., item.part] += item.bias_rounding if rounded else 0.0
        return tensor.swapaxes(0, 1) if sequence_first(probe.node) else tensor

    def carried(self, name: str) -> Sequence[Carried]:
        """The ``1 / r`` that a layer's output carries in the file."""
        return self._carried.get(name, ())

    def timestep(self, step: float) -> Tensor:
        """A timestep as the file reads it."""
        value = next((item for item in self.graph.graph.inputs if item.name == "timestep"), None)
        floating = value is not None and value.dtype == ir.DataType.FLOAT
        return torch.tensor([step], dtype=torch.float32 if floating else torch.int64)

    def _known(self, name: str, what: str, value: ir.Value, tensor: Tensor) -> bool:
        """Whether a value was compared before in this call: then the other layer must have read the same."""
        mark = fingerprint(tensor)
        if value not in self._equal:
            self._equal[value] = mark
            return False
        self.run.release(value)
        if self._equal[value] != mark:
            self.seen.differences.append(Difference(place=name, what="shared", found=Distance(0.0, 1.0)))
        return True

    def _compare(
        self, name: str, what: str, value: ir.Value, tensor: Tensor, instead: Tensor | None = None
    ) -> None:
        """Compares a value of the file, and lets the file read PyTorch's, or another, in its place."""
        if self._known(name, what, value, tensor):
            return
        with _naming(name):
            found = distance(tensor, self.run.value(value))
        self._note(name, what, found, value, self._tolerance(value))
        self.run.force(value, (tensor if instead is None else instead).to(torch.float64))
        self.run.release(value)

    def _compare_codes(self, name: str, value: ir.Value, codes: Tensor) -> None:
        if self._known(name, "codes", value, codes):
            return
        with _naming(name):
            stored = self.run.value(value)
        share = 1.0 if stored.shape != codes.shape else float((stored != codes).double().mean())
        self._note(name, "codes", Distance(float("inf") if share == 0 else 0.0, share), value, 0.0)
        self.run.force(value, codes)
        self.run.release(value)

    def _note(self, name: str, what: str, found: Distance, value: ir.Value, tolerance: float) -> None:
        seen = self.seen
        seen.tensors += 1
        if tolerance == self.tolerances.tensor or what == "codes":
            seen.least_db = min(seen.least_db, found.sqnr_db)
        if found.worst > seen.worst:
            seen.worst, seen.where = found.worst, f"{name} ({what})"
        if not found.worst <= tolerance:
            suspects = self._suspects(value) if what != "codes" else ()
            seen.differences.append(Difference(place=name, what=what, found=found, suspects=suspects, call=self._label))

    def _suspects(self, value: ir.Value) -> tuple[str, ...]:
        """Modules between a tensor and those that were compared before it, in the graph's order."""
        modules: dict[str, None] = {}
        for node in self._stretch(value):
            for layer in reversed(layers_of((node.name or "").rpartition("/")[0])):
                modules.setdefault(layer)
        return tuple(reversed(modules))

    def _tolerance(self, value: ir.Value) -> float:
        """What a tensor may be off: more, where rows of tables or sines enter that PyTorch's did not replace."""
        kinds = [_slack(node) for node in self._stretch(value)]
        return max((getattr(self.tolerances, kind) for kind in kinds if kind), default=self.tolerances.tensor)

    def _stretch(self, value: ir.Value) -> Iterator[ir.Node]:
        """Nodes between a tensor and those that were made equal before it, the last one first."""
        stack, known = [value], set[ir.Value]()
        while stack:
            item = stack.pop()
            node = item.producer()
            if item in known or node is None:
                continue
            known.add(item)
            if item is not value and (item in self._equal or item in self._forced):
                continue
            yield node
            stack.extend(source for source in node.inputs if source is not None)


def _slack(node: ir.Node) -> str:
    """Which tolerance what a node makes needs; none where it makes nothing that is rounded."""
    if node.op_type in _SINES:
        return "early"
    # rows of quantizers are FP32, and those of first tokens are forced
    exact = (node.name or "").partition("/")[0] in {*TABLES, _FIRST_TOKENS}
    if node.op_type != "Gather" or node.outputs[0].dtype not in _FLOATS or exact:
        return ""
    table, rows = node.inputs[:2]
    constant = table is not None and table.const_value is not None
    return "tabled" if constant and rows is not None and rows.const_value is None else ""


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which layer it was where the file cannot be executed."""
    try:
        yield
    except UnsupportedError:
        raise
    except ParityError as error:
        raise ParityError(f"{name}: {error}") from error


def _first_tokens(graph: ir.Model) -> dict[str, ir.Value]:
    """What each layer puts in front of its other tokens, by the module that does it."""
    return {
        name: node.inputs[0]
        for node in graph.graph
        if node.op_type == "Concat" and (name := (node.name or "").rpartition("/")[0]).endswith(".first_token")
        if node.inputs[0] is not None
    }


def stored_codes(quantizer: ActivationQuantizer, x: Tensor, pads: Sequence[int]) -> Tensor:
    """The codes as the ONNX file should have them: behind its padding, and less the offset of the carrier."""
    spec = quantizer.spec
    if pads:
        half = len(pads) // 2
        # torch counts from the last dimension
        x = nn.functional.pad(x, [width for axis in reversed(range(half)) for width in (pads[axis], pads[half + axis])])
    codes = activation_codes(quantizer, x)
    if spec.format != "int":
        return codes
    offset = carrier_offset(spec.qmin, spec.qmax, quantizer.zero_point.numpy())
    if offset is not None:
        return codes - offset
    row = None if quantizer.scale.shape[0] == 1 or quantizer.context is None else quantizer.context.row
    zero = quantizer.zero_point[:1] if row is None else quantizer.zero_point[row]
    return codes - zero.reshape([-1] + [1] * (x.dim() - 1))


def _carried(layers: Mapping[str, LayerProbe], denoiser: nn.Module) -> dict[str, list[Carried]]:
    """Which layers' outputs carry the ``1 / r`` of another layer in the file (pass fold-reparam)."""
    found: dict[str, list[Carried]] = {}
    for name, probe in layers.items():
        layer: Any = denoiser.get_submodule(name.partition("#")[0])
        for scaled, first in scaled_for(probe.node):
            reader: Any = denoiser.get_submodule(scaled)
            inverse = reader.channel_scale.inverse.flatten().to(torch.float64)
            part = slice(first, first + len(inverse))
            lost = torch.zeros_like(inverse)
            if layer.bias is not None and not name.endswith("#1"):  # the bias is the first part's
                right = layer.bias.detach()[part].to(torch.float64) * inverse
                lost = right.to(layer.bias.dtype).to(torch.float64) - right
            found.setdefault(name, []).append(Carried(part=part, inverse=inverse, bias_rounding=lost))
    return found
