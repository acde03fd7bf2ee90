"""Which layers the error of a quantized network comes from, and what each of them is helped by.

Quantizing one layer after the other and calling the network each time would take a call for every layer. Instead, one
backward pass of the floating-point network tells all layers at once: if ``d`` is what quantization changes in a
layer's output and ``v`` a random direction with unit variance, then ``(J^T v) . d`` has the variance ``|J d|^2``, the
squared error that this layer alone makes in the network's output, to first order. With the error that the whole
quantized network makes in place of ``v``, the same product is the part of it that comes from the layer; the parts add
up to the whole as far as the first order reaches, which is reported beside them.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
import torch
from torch import Tensor, nn

from qdexport.check.exact import exact_call
from qdexport.check.layer_advice import LayerRanges, advice, ranges_of
from qdexport.check.measure import decibels
from qdexport.core.results import LayerError, LayerErrors
from qdexport.core.spec import LayerPlan
from qdexport.models.denoiser import call_denoiser, shortcut_splits
from qdexport.models.sampling import DenoiserCall
from qdexport.quant.attach import QuantizedModel, shared_copy
from qdexport.quant.modules import quantizer_pairs

__all__ = ["layer_errors"]

OnProgress = Callable[[int, int], None]
# random directions for each call: with three calls of two rows, 24 numbers are behind each layer's error (1.3 dB)
_PROBES: Final = 4
# what a backward pass holds, in units of what the layers write: their outputs twice, two changes and a gradient
# of each, and what norms, activation functions and attention keep between them
_HELD: Final = 8
_ENOUGH: Final = 0.7  # of the memory that is free


@dataclass(slots=True)
class _Layer:
    """Sums over calls of one layer: squares of what it changes in its own output, and in the network's."""

    own: float = 0.0
    signal: float = 0.0
    weight: float = 0.0
    inputs: float = 0.0
    alone: float = 0.0
    part: float = 0.0
    ranges: LayerRanges = field(default_factory=LayerRanges)


@dataclass(slots=True)
class _Change:
    """What quantization changes in one layer's output in one call, and what that of its weight alone does."""

    whole: Tensor
    by_weight: Tensor


def layer_errors(
    model: QuantizedModel, calls: Sequence[DenoiserCall], seed: int = 0, on_progress: OnProgress | None = None
) -> LayerErrors | None:
    """Ranks the quantized layers by the error that each makes in the denoiser's output.

    Args:
        model: the fake-quant model beside its floating-point one.
        calls: of its sampling run, at several steps.
        seed: of the random directions.
        on_progress: called with the calls done and their total.

    Returns:
        The layers, the largest error first; None where none is quantized. Where a backward pass needs more memory than
        is free (``method`` is then ``local``), a layer's error is that of its own output, relative to it, and what
        becomes of it in the network is not known.
    """
    plans = [plan for plan in model.plans if plan.quantizes_weight]
    if not plans or not calls:
        return None
    study = _Study(model, plans, torch.Generator().manual_seed(seed))
    backward = _fits(study.floating, plans, calls[0])
    for done, call in enumerate(calls):
        study.add(call, backward=backward)
        if on_progress is not None:
            on_progress(done + 1, len(calls))
    return study.results("first order" if backward else "local", len(calls))


class _Study:
    """Runs the floating-point network with the quantized layers beside its own, and adds up what they change."""

    def __init__(self, model: QuantizedModel, plans: Sequence[LayerPlan], random: torch.Generator) -> None:
        self._model, self._plans, self._random = model, plans, random
        denoiser = model.loaded.denoiser
        plain = all(item.dtype == torch.float32 for item in denoiser.parameters())
        self.floating = denoiser if plain else shared_copy(denoiser, torch.float32)
        self._layers = {plan.name: _Layer() for plan in plans}
        splits = shortcut_splits(denoiser)
        for plan in plans:
            twin = model.denoiser.get_submodule(plan.name)
            self._layers[plan.name].ranges = ranges_of(twin, () if plan.splits else splits.get(plan.name, ()))
        self._signal = self._whole = 0.0

    def add(self, call: DenoiserCall, *, backward: bool) -> None:
        """Takes one call."""
        changes: dict[str, list[_Change]] = defaultdict(list)
        with self._hooked(self._model.denoiser, lambda plan: self._measure(plan, changes[plan.name], keep=backward)):
            quantized = exact_call(self._model.denoiser, call.inputs)
        outputs: dict[str, list[Tensor]] = defaultdict(list)
        with self._hooked(self.floating, lambda plan: _keep(outputs[plan.name])), torch.set_grad_enabled(backward):
            output = call_denoiser(self.floating, _single(call))
        self._signal += _energy(output)
        error = quantized - output.detach()
        self._whole += _energy(error)
        if backward:
            self._follow(output, error, outputs, changes)

    def results(self, method: str, calls: int) -> LayerErrors:
        """Everything, the largest error first."""
        known = method != "local"
        found = [self._result(plan, known=known) for plan in self._plans]
        return LayerErrors(
            method="first order" if known else "local",
            calls=calls,
            whole_db=decibels(self._signal, self._whole),
            explained=sum(item.share or 0.0 for item in found) if known else None,
            layers=sorted(found, key=lambda item: item.alone_db),
        )

    def _result(self, plan: LayerPlan, *, known: bool) -> LayerError:
        layer = self._layers[plan.name]
        split = layer.weight + layer.inputs
        share = layer.weight / split if 0 < split < math.inf else 1.0
        rows = max(quantizer.scale.shape[0] if quantizer is not None else 1 for quantizer, _ in self._pairs(plan.name))
        change, why = advice(plan, layer.ranges, share, rows=rows)
        return LayerError(
            name=plan.name,
            alone_db=decibels(self._signal, layer.alone) if known else decibels(layer.signal, layer.own),
            own_db=decibels(layer.signal, layer.own),
            share=layer.part / self._whole if known and 0 < self._whole < math.inf else None,
            weight_share=share,
            change=change,
            advice=why,
        )

    def _pairs(self, name: str) -> Any:
        return quantizer_pairs(self._model.denoiser.get_submodule(name))

    @contextlib.contextmanager
    def _hooked(self, network: nn.Module, make: Callable[[LayerPlan], Callable[..., Tensor | None]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for plan in self._plans:
                hook = network.get_submodule(plan.name).register_forward_hook(make(plan))
                stack.callback(hook.remove)
            yield

    def _measure(self, plan: LayerPlan, changes: list[_Change], *, keep: bool) -> Callable[..., None]:
        """What a layer changes on the inputs that it has in the quantized network: rounding errors of other inputs are
        other ones, and would not add up to the error that is seen.
        """
        floating, layer, pairs = self.floating.get_submodule(plan.name), self._layers[plan.name], self._pairs(plan.name)

        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            (x,) = args
            exact = floating(x)
            change = output - exact
            with _unquantized_inputs(pairs):
                by_weight = module.forward(x) - exact  # not through its hooks
            for operand, (quantizer, _) in zip(module.operands(x), pairs, strict=True):
                if quantizer is not None:
                    layer.ranges.add_input(operand, quantizer, 1 if plan.kind == "conv" else operand.dim() - 1)
            layer.own, layer.signal = layer.own + _energy(change), layer.signal + _energy(exact)
            if keep:
                changes.append(_Change(change, by_weight))
            else:
                layer.weight += _energy(by_weight)
                layer.inputs += _energy(change - by_weight)

        return hook

    def _follow(
        self, output: Tensor, error: Tensor, outputs: dict[str, list[Tensor]], changes: dict[str, list[_Change]]
    ) -> None:
        """Backward passes: in the direction of the whole error, and in random ones."""
        tensors = [item for items in outputs.values() for item in items]
        directions = [error, *(torch.randn(output.shape, generator=self._random) for _ in range(_PROBES))]
        for number, direction in enumerate(directions):
            last = number == len(directions) - 1
            found = torch.autograd.grad(output, tensors, direction, retain_graph=not last, allow_unused=True)
            gradients = iter(found)
            for name, items in outputs.items():
                layer, slopes = self._layers[name], [next(gradients) for _ in items]
                change = _along(slopes, [item.whole for item in changes[name]], len(output))
                if number == 0:
                    layer.part += float(change.sum())
                    continue
                by_weight = _along(slopes, [item.by_weight for item in changes[name]], len(output))
                layer.alone += float(change.square().sum()) / _PROBES
                layer.weight += float(by_weight.square().sum())
                layer.inputs += float((change - by_weight).square().sum())


def _keep(outputs: list[Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # what depends on neither latents nor weights starts the graph
        outputs.append(output)
        return output.clone()  # what follows may write into it, and the gradient is that of the layer's own

    return hook


def _along(slopes: Sequence[Tensor | None], changes: Sequence[Tensor], rows: int) -> Tensor:
    """Products of gradients and changes, FP64: one for each row of the call where a layer has as many, else one."""
    total = torch.zeros(rows, dtype=torch.float64)
    for slope, change in zip(slopes, changes, strict=True):
        if slope is None:  # what the output does not depend on
            continue
        product = (slope * change).double()
        if product.shape[0] == rows:
            total += product.reshape(rows, -1).sum(dim=1)
        else:
            total[0] += product.sum()
    return total


@contextlib.contextmanager
def _unquantized_inputs(pairs: Any) -> Iterator[None]:
    hooks = [
        quantizer.register_forward_hook(lambda module, args, output: args[0])
        for quantizer, _ in pairs
        if quantizer is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _energy(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def _fits(floating: nn.Module, plans: Sequence[LayerPlan], call: DenoiserCall) -> bool:
    """Whether a backward pass through all layers fits into the memory that is free."""
    written = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal written
        written += output.numel() * output.element_size()

    hooks = [floating.get_submodule(plan.name).register_forward_hook(count) for plan in plans]
    try:
        with torch.no_grad():
            call_denoiser(floating, _single(call))
    finally:
        for hook in hooks:
            hook.remove()
    return _HELD * written < _ENOUGH * psutil.virtual_memory().available


def _single(call: DenoiserCall) -> dict[str, Tensor]:
    return {name: item.float() if item.is_floating_point() else item for name, item in call.inputs.items()}
