"""What a network makes of one condition alone (of the timestep, of a class label), in PyTorch and in the ONNX file.

Such values are tables in the file, or small enough to be computed for every timestep and every class. PyTorch's
operators that read nothing else are noted once while the denoiser runs, and repeated for any other value of the
condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from qdexport.check.float64.compare import distance
from qdexport.check.float64.graph import Float64Graph
from qdexport.check.float64.halves import stored_roundings
from qdexport.check.float64.model import Float64, float64_inputs, in_float64
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE
from qdexport.models.denoiser import call_denoiser

__all__ = ["TABLES", "Condition", "Pairing", "fitted_rows", "onnx_sources", "pair", "record"]

TABLES: Final = ("step_table", "softmax_table")  # rows of quantizers: layers are compared at each of them
_QUANTIZERS: Final = frozenset({"QuantizeLinear", DYNAMIC_QUANTIZE})
_FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


@dataclass(slots=True)
class Condition:
    """PyTorch's operators that depend on some inputs alone, and those of their results that others read.

    Attributes:
        names: the inputs.
        inputs: their tensors in the call that was noted.
        tape: operators in order, with their arguments and results.
        leaves: floating-point results that an operator reads beside other inputs.
    """

    names: frozenset[str]
    inputs: dict[str, Tensor]
    tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)

    def values(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The leaves for other inputs of the same shapes."""
        with torch.no_grad(), Float64():
            return self._repeated(inputs)

    def rows(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The leaves for many inputs at once: along a new first dimension of the inputs, and of the results."""
        with torch.no_grad(), Float64():
            repeated: list[Tensor] = torch.func.vmap(self._repeated)(dict(inputs))
        return repeated

    def _repeated(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        known = {id(old): inputs[name] for name, old in self.inputs.items()}
        for func, args, kwargs, outputs in self.tape:
            new_args, new_kwargs = tree_map(lambda item: known.get(id(item), item), (args, kwargs))
            results = [item for item in tree_leaves(func(*new_args, **new_kwargs)) if isinstance(item, Tensor)]
            known.update(zip(map(id, outputs), results, strict=True))
        return [known[id(leaf)] for leaf in self.leaves]

    def shorten(self) -> None:
        """Leaves out of the tape what no leaf needs (checks of the timestep, rows of quantizers)."""
        needed = {id(leaf) for leaf in self.leaves}
        kept = []
        for entry in reversed(self.tape):
            _, args, kwargs, outputs = entry
            if any(id(item) in needed for item in outputs):
                needed.update(id(item) for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor))
                kept.append(entry)
        self.tape = kept[::-1]


def record(denoiser: nn.Module, inputs: Mapping[str, Tensor], conditions: Sequence[frozenset[str]]) -> list[Condition]:
    """Runs a denoiser once in float64 and notes what depends on each condition alone."""
    wide = float64_inputs(inputs)
    found = [Condition(names, {name: wide[name] for name in names}) for names in conditions]
    with in_float64(denoiser), _Sources(wide, found):
        call_denoiser(denoiser, wide)
    for condition in found:
        condition.shorten()
    return found


class _Sources(Float64):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes which inputs every tensor depends on."""

    def __init__(self, inputs: Mapping[str, Tensor], conditions: Sequence[Condition]) -> None:
        super().__init__()
        self._sources: Any = WeakTensorKeyDictionary()
        for name, tensor in inputs.items():
            self._sources[tensor] = frozenset({name})
        self._conditions = conditions
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        read = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        sources = [self._sources.get(item, frozenset()) for item in read]
        everything = frozenset[str]().union(*sources)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        for item in made:
            self._sources[item] = everything
        for condition in self._conditions:
            if everything and everything <= condition.names:
                condition.tape.append((func, args, kwargs, made))
            elif everything & condition.names:
                for item, own in zip(read, sources, strict=True):
                    if own and own <= condition.names and item.is_floating_point() and id(item) not in self._known:
                        self._known.add(id(item))  # the tape keeps it alive, so that its id stays its own
                        condition.leaves.append(item)
        return result


def onnx_sources(model: ir.Model) -> dict[ir.Value, frozenset[str]]:
    """The graph inputs that every computed value depends on."""
    found: dict[ir.Value, frozenset[str]] = {value: frozenset({str(value.name)}) for value in model.graph.inputs}
    for node in model.graph:
        union = frozenset[str]().union(*(found.get(value, frozenset()) for value in node.inputs if value is not None))
        found.update(dict.fromkeys(node.outputs, union))
    return found


def _frontier(model: ir.Model, sources: Mapping[ir.Value, frozenset[str]], names: frozenset[str]) -> list[ir.Value]:
    """Floating-point values that depend on some inputs alone and are read beside others.

    Rows of quantizers are not among them, nor what is computed behind a quantizer, whose codes may fall either way:
    there, layers are compared on equal inputs.
    """
    found: dict[ir.Value, None] = {}
    left_out = _behind_tables(model) | _behind_quantizers(model)
    for node in model.graph:
        if sources[node.outputs[0]] <= names:
            continue
        for value in node.inputs:
            own = frozenset() if value is None else sources.get(value, frozenset())
            if value is not None and own and own <= names and value.dtype in _FLOATS and value not in left_out:
                found.setdefault(value)
    return list(found)


def _behind_tables(model: ir.Model) -> set[ir.Value]:
    """What is made of rows of quantizers and constants."""
    found: set[ir.Value] = set()
    for node in model.graph:
        read = [value for value in node.inputs if value is not None and value.const_value is None]
        if (node.name or "").partition("/")[0] in TABLES or (read and all(value in found for value in read)):
            found.update(node.outputs)
    return found


def _behind_quantizers(model: ir.Model) -> set[ir.Value]:
    """What depends on codes of activations."""
    found: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in _QUANTIZERS or any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which value of the file is which of PyTorch's.

    Attributes:
        condition: PyTorch's side.
        values: of the file, and for each the number of the leaf and what its channels are multiplied by.
        unknown: values of the file that equal nothing that PyTorch makes of the condition.
        guards: values that are 0 wherever the file has an answer.
    """

    condition: Condition
    values: dict[ir.Value, tuple[int, Tensor | None]]
    unknown: tuple[ir.Value, ...]
    guards: tuple[ir.Value, ...]

    def expected(self, leaves: Sequence[Tensor]) -> Iterator[tuple[ir.Value, Callable[[Tensor], Tensor]]]:
        """For each value of the file, what brings PyTorch's numbers into the shape of the file's."""
        for value, (index, factor) in self.values.items():
            yield value, _fitting(leaves[index], factor)


def _fitting(leaf: Tensor, factor: Tensor | None) -> Callable[[Tensor], Tensor]:
    def fit(like: Tensor) -> Tensor:
        return _fit(leaf, factor, like)

    return fit


def _fit(leaf: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """A leaf in the shape of a value; one row of it where the file has one and PyTorch one for each sample."""
    item = leaf
    if item.numel() != like.numel() and item.dim() and item.shape[0]:
        item = item[:1]
    if item.numel() != like.numel():
        return item
    item = item.reshape(like.shape).to(torch.float64)
    if factor is None:
        return item
    axis = next((axis for axis in range(1, like.dim()) if like.shape[axis] == factor.numel()), like.dim() - 1)
    shape = [1] * like.dim()
    shape[axis] = -1
    return item * factor.to(torch.float64).reshape(shape)


def fitted_rows(leaf: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """Rows of a leaf (:meth:`Condition.rows`) in the shape of a value of the file that has as many."""
    item = leaf.flatten(1)
    width = like[:1].numel()
    if item.shape[1] > width:  # one row of each sample's
        item = item[:, :width]
    return _fit(item, factor, like) if item.numel() == like.numel() else item


def pair(
    run: Float64Graph,
    model: ir.Model,
    condition: Condition,
    samples: Sequence[Mapping[str, Tensor]],
    factors: Sequence[Tensor],
    tolerance: float,
) -> Pairing:
    """Finds for every value of the file the one of PyTorch's that it equals at most of some samples.

    Args:
        run: executes the file.
        model: its graph.
        condition: PyTorch's side.
        samples: values of the condition.
        factors: what channels of a value may be multiplied by in the file (pass fold-reparam).
        tolerance: for the worst element.
    """
    frontier = _frontier(model, onnx_sources(model), condition.names)
    votes: dict[ir.Value, dict[tuple[int, int], int]] = {value: {} for value in frontier}
    zeros: dict[ir.Value, int] = dict.fromkeys(frontier, 0)
    for sample in samples:
        leaves = condition.values(sample)
        run.start(sample)
        for value in frontier:
            found = run.value(value)
            zeros[value] += bool((found == 0).all())
            for key in _equals(value, found, leaves, factors, tolerance):
                votes[value][key] = votes[value].get(key, 0) + 1
    known, unknown, guards = {}, [], []
    for value in frontier:
        best = max(votes[value], key=lambda key: votes[value][key], default=None)
        if best is not None and 2 * votes[value][best] > len(samples):
            index, number = best
            known[value] = (index, None if number < 0 else factors[number])
        elif 2 * zeros[value] > len(samples):
            guards.append(value)
        else:
            unknown.append(value)
    return Pairing(condition, known, tuple(unknown), tuple(guards))


def _equals(
    value: ir.Value, found: Tensor, leaves: Sequence[Tensor], factors: Sequence[Tensor], tolerance: float
) -> Iterator[tuple[int, int]]:
    """Numbers of the leaves, and of the factor (-1: none), that a value equals."""
    for index, leaf in enumerate(leaves):
        if found.numel() in (leaf.numel(), leaf[:1].numel() if leaf.dim() else 1):
            for number in range(-1, len(factors)):
                factor = None if number < 0 else factors[number]
                if factor is not None and factor.numel() not in found.shape:
                    continue
                roundings = stored_roundings(value, scaled=factor is not None)
                if distance(_fit(leaf, factor, found), found, roundings).worst <= tolerance:
                    yield index, number
                    break
