"""One forward pass without data, and what it tells about every layer: cost, sources, shared inputs.

The pass runs on the meta device, so a model of billions of parameters takes a second and no memory. Every
tensor gets a value number: equal numbers mean the same operator on the same values, hence equal tensors,
even where a module computes them twice (each resnet block applies SiLU to the time embedding again). Beside
it stands the set of network inputs that the value was computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdexport.core.io_spec import IoSpec
from qdexport.core.precision import LayerKind
from qdexport.core.reading import reading
from qdexport.errors import ModelError
from qdexport.models.denoiser_io import call_denoiser

__all__ = ["LayerTrace", "trace_denoiser"]

_REMEDY: Final = "check the sizes in its config.json"


@dataclass(frozen=True, slots=True)
class _Value:
    number: int
    sources: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """What one Conv2d or Linear did in the pass.

    Attributes:
        name: Module path in the denoiser.
        kind: `conv` or `linear`.
        macs: Multiply-accumulates of all its calls.
        calls: How often it ran.
        sources: Names of the network inputs that its input depends on.
        value: Value number of its input; equal numbers are equal tensors. None when its calls differ.
        input_name: The network input that it reads directly, or None.
    """

    name: str
    kind: LayerKind
    macs: int
    calls: int
    sources: frozenset[str]
    value: int | None
    input_name: str | None


@dataclass(slots=True)
class _Record:
    macs: int = 0
    values: list[_Value] = field(default_factory=list)


def trace_denoiser(denoiser: nn.Module, io: IoSpec) -> dict[str, LayerTrace]:
    """Runs the denoiser once at the best sizes, without data.

    Args:
        denoiser: A diffusers UNet, on any device; its weights are not read.
        io: The network's inputs; floating-point ones take the type of the denoiser's weights.

    Returns:
        Every Conv2d and Linear that ran, in the order of their first calls.
    """
    layers = {
        name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    records: dict[str, _Record] = {}
    state = {name: value.to("meta") for name, value in _state(denoiser)}
    inputs = _empty_inputs(denoiser, io)

    def without_data(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(denoiser, state, args, kwargs)

    with torch.no_grad(), _ValueNumbers(inputs) as numbers:
        handles = [_watch(module, records, name, numbers) for name, module in layers.items()]
        try:
            what = f"a {type(denoiser).__name__} of this configuration"
            with reading(what, ModelError, _REMEDY, what="cannot be run"):
                call_denoiser(without_data, inputs)
        finally:
            for handle in handles:
                handle.remove()
    inputs_by_number = {numbers.value_of(tensor).number: name for name, tensor in inputs.items()}
    return {name: _summary(name, layers[name], record, inputs_by_number) for name, record in records.items()}


class _ValueNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Numbers every tensor that operators make."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._values: dict[int, _Value] = {}
        self._numbers: dict[object, int] = {}
        self._alive: list[Tensor] = []  # a freed tensor's id would be given to another
        for name, tensor in inputs.items():
            self._set(tensor, _Value(self._number(("input", name)), frozenset({name})))

    def value_of(self, tensor: Tensor) -> _Value:
        """A tensor's value; one that no operator made (a weight, a constant) has no sources."""
        if id(tensor) not in self._values:
            self._set(tensor, _Value(self._number(("constant", id(tensor))), frozenset()))
        return self._values[id(tensor)]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        values = [self.value_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        sources = frozenset[str]().union(*(value.sources for value in values if value is not None))
        parts = (
            repr(leaf) if value is None else value.number for leaf, value in zip(leaves, values, strict=True)
        )
        key: tuple[object, ...] = (func, tuple(kwargs), *parts)
        if torch.Tag.nondeterministic_seeded in func.tags:  # type: ignore[attr-defined]
            key = (*key, len(self._numbers))
        output = func(*args, **kwargs)
        changed = _written(func, args, kwargs)
        old = {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and id(leaf) not in old]
        for index, tensor in enumerate([*changed, *made]):
            self._set(tensor, _Value(self._number((*key, index)), sources))
        return output

    def _set(self, tensor: Tensor, value: _Value) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


def _state(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from denoiser.named_parameters()
    yield from denoiser.named_buffers()


def _empty_inputs(denoiser: nn.Module, io: IoSpec) -> dict[str, Tensor]:
    weight = next((p for p in denoiser.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise ModelError(f"{type(denoiser).__name__} has no floating-point weights")
    inputs = {}
    for spec in io.inputs:
        dtype = getattr(torch, spec.dtype)
        dtype = weight.dtype if dtype.is_floating_point else dtype
        inputs[spec.name] = torch.empty(spec.shape(), dtype=dtype, device="meta")
    return inputs


def _watch(module: nn.Module, records: dict[str, _Record], name: str, numbers: _ValueNumbers) -> Any:
    # one output element is a sum over one row of the weight
    row = math.prod(module.get_parameter("weight").shape[1:])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        record = records.setdefault(name, _Record())
        record.values.append(numbers.value_of(args[0]))
        record.macs += output.numel() * row

    return module.register_forward_hook(after)


def _summary(name: str, layer: nn.Module, record: _Record, inputs: Mapping[int, str]) -> LayerTrace:
    numbers = {value.number for value in record.values}
    number = numbers.pop() if len(numbers) == 1 else None
    return LayerTrace(
        name=name,
        kind="conv" if isinstance(layer, nn.Conv2d) else "linear",
        macs=record.macs,
        calls=len(record.values),
        sources=frozenset[str]().union(*(value.sources for value in record.values)),
        value=number,
        input_name=None if number is None else inputs.get(number),
    )
