"""Compiler parity: fake-quant PyTorch against the ONNX file, layer by layer on equal inputs, and end to end.

A network-wide comparison neither passes when a quantized network is right nor tells where it is wrong: a
difference in the last bit flips a code, and the network multiplies it. Each layer on its own, fed with the
same tensor, has to agree.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qdexport.check.calls import fit_inputs
from qdexport.check.exact import exact_call, exact_predictions
from qdexport.check.measure import WORST_DB, flip_rate
from qdexport.check.runs import Feed, compare_with_onnx
from qdexport.core.carrier import carrier_offset
from qdexport.core.io_spec import IoSpec
from qdexport.core.precision import LARGEST
from qdexport.core.results import LayerParity
from qdexport.core.spec import LayerPlan
from qdexport.emit.inspect import load_onnx
from qdexport.errors import ParityError
from qdexport.graph.probe import LayerProbe, Probe, build_probe, find_probes, find_softmax_probes, weight_codes
from qdexport.graph.query import scaled_for, sequence_first
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.affine import nvfp4_codes, quantize_codes
from qdexport.quant.attach import QuantizedModel
from qdexport.quant.modules import ActivationQuantizer, WeightQuantizer, quantizer_pairs
from qdexport.quant.packing import weight_codes as torch_codes
from qdexport.quant.softmax import SoftmaxQuantizer

__all__ = ["end_to_end", "layer_parity"]

logger = logging.getLogger(__name__)

OnCall = Callable[[int, int], None]
_CHUNK_BYTES = 256 << 20


def layer_parity(
    model: QuantizedModel,
    onnx_path: Path,
    io: IoSpec,
    calls: Sequence[DenoiserCall],
    on_progress: OnCall | None = None,
) -> list[LayerParity]:
    """Compares every layer with a quantized weight on the inputs that it has in the given denoiser calls.

    PyTorch computes in FP32 whatever the type of the body; the inputs of an FP16 body's layers are rounded to FP16.
    Layers are cut out of the ONNX file and run in chunks as PyTorch reaches them, so that the memory beyond
    the two models stays below some hundred megabytes.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file.
        io: its inputs.
        calls: at three timesteps or more, the first and the last of a schedule among them.
        on_progress: called with the denoiser calls done and their total.

    Returns:
        One entry per layer with a quantized weight (per part of a split layer), in the plan's order, of its worst call.

    Raises:
        ParityError: a layer is not quantized in the file, does not run in PyTorch, or the file cannot be run.
        ModelError: there is no such ONNX file.
    """
    plans = [plan for plan in model.plans if plan.quantizes_weight]
    softmax = [name for name, module in model.denoiser.named_modules() if isinstance(module, SoftmaxQuantizer)]
    weight_only = [plan.name for plan in plans if plan.weight_only]
    comparison = _Comparison(onnx_path, [part for plan in plans for part in plan.parts], softmax, weight_only)
    comparison.carry(model.denoiser)
    for done, call in enumerate(calls):
        inputs = fit_inputs(call.inputs, io)
        comparison.start({name: tensor.numpy() for name, tensor in inputs.items()})
        with _tapped(model, plans, comparison), _tapped_softmax(model, softmax, comparison):
            exact_call(model.denoiser, inputs)
        comparison.finish()
        if on_progress is not None:
            on_progress(done + 1, len(calls))
    return comparison.results(len(calls))


def end_to_end(
    model: QuantizedModel,
    onnx_path: Path,
    io: IoSpec,
    calls: Sequence[DenoiserCall],
    exact: Sequence[np.ndarray] | None = None,
) -> list[float]:
    """The SQNR of each of several whole denoiser calls, in decibels.

    Args:
        model: the fake-quant model.
        onnx_path: the emitted file, run by ONNX Runtime.
        io: its inputs and outputs.
        calls: the inputs; those of the noise floor that stands beside the number.
        exact: what the fake-quant model gives for them in FP32, if it is known already.

    Raises:
        ParityError: the file cannot be run on these calls.
    """
    inputs = [fit_inputs(call.inputs, io) for call in calls]
    feeds = [{name: tensor.numpy() for name, tensor in named.items()} for named in inputs]
    output = io.outputs[0].name
    answers = iter(exact_predictions(model.denoiser, inputs) if exact is None else exact)
    matches = compare_with_onnx(onnx_path, lambda _: {output: next(answers)}, feeds)
    return [match[output].sqnr_db for match in matches]


@dataclass(slots=True)
class _Worst:
    """The worst that was seen of one layer."""

    sqnr_db: float = np.inf
    codes: float = 0.0
    weight: float | None = None
    calls: int = 0
    beyond: float | None = None

    def see(self, *tensors: np.ndarray) -> None:
        """Notes the largest number of a layer of an FP16 body, where FP16 cannot hold it."""
        for tensor in tensors:
            peak = float(np.abs(tensor).max(initial=0))
            if not peak <= LARGEST["fp16"] and not (self.beyond or 0.0) >= peak:
                self.beyond = peak


@dataclass(slots=True)
class _Chunk:
    """Layers whose tensors wait for their run in ONNX Runtime."""

    names: list[str] = field(default_factory=list)
    feed: Feed = field(default_factory=dict)
    expected: Feed = field(default_factory=dict)
    bytes: int = 0


class _Comparison:
    """Takes tensors of layers from PyTorch, runs the same layers in ONNX Runtime, and keeps the worst."""

    def __init__(
        self, path: Path, names: Sequence[str], softmax: Sequence[str] = (), weight_only: Sequence[str] = ()
    ) -> None:
        self._model = load_onnx(path)
        self._folder = path.parent
        self._layers = find_probes(self._model, names, frozenset(weight_only))
        self._probes: dict[str, Probe] = {**self._layers, **find_softmax_probes(self._model, softmax)}
        self._worst = {name: _Worst() for name in names}
        self._worst |= {name: _Worst(weight=0.0) for name in softmax}  # no weight to compare
        self._inputs: Feed = {}
        self._chunk = _Chunk()
        self._carried: dict[str, list[tuple[int, Tensor]]] = {}

    def carry(self, denoiser: nn.Module) -> None:
        """Notes which layers' outputs carry the ``1 / r`` of another layer in the file (pass fold-reparam)."""
        for name, probe in self._layers.items():
            for scaled, first in scaled_for(probe.node):
                layer: Any = denoiser.get_submodule(scaled)
                self._carried.setdefault(name, []).append((first, layer.channel_scale.inverse.flatten()))

    def start(self, inputs: Feed) -> None:
        """Begins a denoiser call."""
        self._inputs = inputs
        self._chunk = _Chunk()

    def weight(self, name: str, quantizer: WeightQuantizer, weight: Tensor) -> None:
        """Compares the codes of a layer's weight, once."""
        worst = self._worst[name]
        if worst.weight is not None:
            return
        codes = torch_codes(weight, quantizer)
        stored = weight_codes(self._layers[name])
        worst.weight = flip_rate(codes.astype(np.int16), stored.astype(np.int16))
        if stored.shape != codes.shape:
            logger.warning(
                "the weight of %s is %s in the ONNX file, %s in PyTorch",
                name,
                stored.shape,
                codes.shape,
            )
            worst.sqnr_db, worst.codes = WORST_DB, 1.0

    def layer(self, name: str, quantizer: ActivationQuantizer | None, x: Tensor, y: Tensor) -> None:
        """Takes one layer's input and output; without a quantizer of the input there are no codes to compare."""
        if name in self._carried:
            y = y.clone()
            channels = y if self._layers[name].node.op_type != "Conv" else y.movedim(1, -1)
            for first, inverse in self._carried[name]:
                channels[..., first : first + len(inverse)] *= inverse
        codes = None if quantizer is None else _codes(quantizer, x, self._layers[name].pads)
        self._take(name, x, codes, y)

    def softmax(self, name: str, x: Tensor, y: Tensor) -> None:
        """Takes the input and output of a quantizer behind softmax; its values stand for its codes."""
        dtype = self._probes[name].y.dtype
        values = y.numpy(force=True)
        with np.errstate(over="ignore"):
            self._take(name, x, values if dtype is None else values.astype(dtype.numpy()), y)

    def _take(self, name: str, x: Tensor, codes: np.ndarray | None, y: Tensor) -> None:
        worst = self._worst[name]
        worst.calls += 1
        if worst.sqnr_db == WORST_DB:
            return  # a layer of another shape cannot be run
        probe = self._probes[name]
        array = x.numpy(force=True).copy()  # the network may write into its tensors afterwards
        dtype = probe.x.dtype
        output = y.numpy(force=True).copy()
        if isinstance(probe, LayerProbe) and sequence_first(probe.node):
            array, output = (np.ascontiguousarray(item.swapaxes(0, 1)) for item in (array, output))
            codes = None if codes is None else np.ascontiguousarray(codes.swapaxes(0, 1))
        if probe.y_name in self._chunk.expected:
            self.finish()  # a network may call a layer twice (DiT its first block's embedding), a graph has it once
        chunk = self._chunk
        chunk.names.append(name)
        if dtype == ir.DataType.FLOAT16:
            worst.see(array, output)
        with np.errstate(over="ignore"):
            chunk.feed[probe.x_name] = array if dtype is None else array.astype(dtype.numpy(), copy=False)
        if codes is not None:
            chunk.expected[probe.codes_name] = codes
        chunk.expected[probe.y_name] = output
        chunk.bytes += 2 * array.nbytes + 2 * y.nbytes
        if chunk.bytes > _CHUNK_BYTES:
            self.finish()

    def finish(self) -> None:
        """Runs the layers that wait."""
        chunk, self._chunk = self._chunk, _Chunk()
        if not chunk.names:
            return
        probe = build_probe(self._model, [self._probes[name] for name in chunk.names])
        fixed = {value.name: self._inputs[value.name] for value in probe.graph.inputs if value.name in self._inputs}
        serialized = ir.to_proto(probe).SerializeToString()
        (matches,) = compare_with_onnx(
            serialized,
            lambda _: chunk.expected,
            [{**fixed, **chunk.feed}],
            layers=chunk.names,
            data_folder=self._folder,
        )
        for name, match in matches.items():
            worst = self._worst[name]
            worst.sqnr_db = min(worst.sqnr_db, match.sqnr_db)
            worst.codes = max(worst.codes, match.flip_rate)

    def results(self, calls: int) -> list[LayerParity]:
        """One entry per layer."""
        idle = [name for name, worst in self._worst.items() if worst.calls < calls or worst.weight is None]
        if idle:
            raise ParityError(
                f"{len(idle)} quantized layers do not run in PyTorch, the first is {idle[0]}; plan the model again"
            )
        return [
            LayerParity(
                name=name,
                sqnr_db=worst.sqnr_db,
                code_flip_rate=worst.codes,
                weight_flip_rate=worst.weight or 0.0,
                steps=calls,
                beyond_fp16=worst.beyond,
            )
            for name, worst in self._worst.items()
        ]


@contextlib.contextmanager
def _tapped(model: QuantizedModel, plans: Sequence[LayerPlan], comparison: _Comparison) -> Iterator[None]:
    """Hands the tensors of every planned layer to the comparison while the denoiser runs."""
    hooks = []
    for plan in plans:
        layer: Any = model.denoiser.get_submodule(plan.name)
        for part, (_, quantizer) in zip(plan.parts, quantizer_pairs(layer), strict=True):
            hooks.append(quantizer.register_forward_pre_hook(partial(_take_weight, comparison, part)))
        half = model.body == "fp16"
        if half:
            hooks.append(layer.register_forward_pre_hook(_round_input))
        hooks.append(layer.register_forward_hook(partial(_take_layer, comparison, plan, half)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _tapped_softmax(model: QuantizedModel, names: Sequence[str], comparison: _Comparison) -> Iterator[None]:
    """Hands what the quantizers behind softmax read and give to the comparison while the denoiser runs."""
    hooks = []
    for name in names:
        quantizer = model.denoiser.get_submodule(name)
        if model.body == "fp16":
            hooks.append(quantizer.register_forward_pre_hook(_round_input))
        hooks.append(quantizer.register_forward_hook(partial(_take_softmax, comparison, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _take_softmax(comparison: _Comparison, name: str, module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
    del module
    comparison.softmax(name, args[0], y)


def _round_input(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The network computes in FP32 here; what a layer reads must be what its ONNX twin can be fed."""
    del layer
    return (_rounded(args[0]), *args[1:])


def _rounded(x: Tensor) -> Tensor:
    # by numpy: in_float32 lets torch make no FP16 tensor
    with np.errstate(over="ignore"):  # what overflows is told with its layer
        return torch.from_numpy(x.numpy(force=True).astype(np.float16).astype(np.float32))


def _take_weight(comparison: _Comparison, name: str, quantizer: Any, args: tuple[Tensor, ...]) -> None:
    comparison.weight(name, quantizer, args[0])


def _take_layer(
    comparison: _Comparison, plan: LayerPlan, half: bool, layer: Any, args: tuple[Tensor, ...], y: Tensor
) -> None:
    """What the quantizers of a layer read (behind its channel scale, without the first token), and its products."""
    whole = not plan.splits and not plan.bos and not (plan.channel_scale and half)
    kernels = layer.kernels()
    for index, operand in enumerate(layer.operands(args[0])):
        x = _rounded(operand) if half else operand
        quantizer, _ = quantizer_pairs(layer)[index]
        product = y if whole else layer.product(index, x, kernels[index])
        comparison.layer(plan.parts[index], quantizer, x, product)


def _codes(quantizer: ActivationQuantizer, x: Tensor, pads: tuple[int, ...]) -> np.ndarray:
    """The codes as the ONNX file should have them: less the zero point, or the offset of the carrier; FP8 as bytes."""
    spec = quantizer.spec
    row = None if quantizer.scale.shape[0] == 1 or quantizer.context is None else quantizer.context.row
    index = torch.zeros(1, dtype=torch.int64) if row is None else row
    shape = [-1] + [1] * (x.dim() - 1)
    scale, zero = quantizer.scale[index].reshape(shape), quantizer.zero_point[index].reshape(shape)
    if pads:
        half = len(pads) // 2
        # torch counts from the last dimension
        widths = [width for axis in reversed(range(half)) for width in (pads[axis], pads[half + axis])]
        x = nn.functional.pad(x, widths)
    if spec.format == "nvfp4":
        return nvfp4_codes(x, quantizer.scale).numpy()  # what ONNX Runtime computes in place of FP4
    if spec.format == "fp8":
        values = quantize_codes(x, scale, zero, spec.qmin, spec.qmax, "fp8")
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()  # ONNX Runtime hands them out as bytes
    codes = quantize_codes(x, scale, zero, spec.qmin, spec.qmax)
    offset = carrier_offset(spec.qmin, spec.qmax, quantizer.zero_point.numpy())
    return (codes - (zero if offset is None else offset)).to(torch.int16).numpy()
