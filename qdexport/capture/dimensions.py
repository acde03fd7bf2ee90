"""Names the dynamic dimensions of a captured graph after those of its inputs, in their simplest form.

torch.export writes the height behind a downsampling and an upsampling as ``2*((s44 - 1)//2) + 2``. With ``s44`` a
multiple of what the downsampling divides by, that is ``height`` again; only equal names let passes and builders see
that two tensors have one size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import sympy  # type: ignore[import-untyped]  # it ships no types; torch.export cannot do without it

from qdexport.errors import CaptureError

if TYPE_CHECKING:
    from qdexport.core.io_spec import IoSpec

__all__ = ["fixed_dimensions", "name_dimensions"]

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_CONSTRAINED = re.compile(r"L\['inputs'\]\['(?P<input>\w+)'\]\.size\(\)\[(?P<axis>\d+)\]")


def fixed_dimensions(message: str, io: IoSpec) -> list[str]:
    """The names of dynamic dimensions that torch.export says the model does not leave free, from its message."""
    specs = {spec.name: spec for spec in io.inputs}
    found = (
        specs[match["input"]].dims[int(match["axis"])].name
        for match in _CONSTRAINED.finditer(message)
        if match["input"] in specs
    )
    return list(dict.fromkeys(found))


def name_dimensions(model: ir.Model, io: IoSpec) -> None:
    """Renames and simplifies every symbolic dimension, and infers shapes that the exporter left open.

    Args:
        model: as captured; the dimensions of its inputs are single symbols.
        io: names the dimensions of the inputs and says which sizes they may have.

    Raises:
        CaptureError: torch.export fixed a dimension that should be dynamic.
    """
    if not io.dynamic_dims:
        return
    names = _Names(model, io)
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        value.shape = names.of(value.shape)
    common_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for value in values:
        value.shape = names.of(value.shape)


class _Names:
    """Turns torch's symbols into names of dimensions."""

    def __init__(self, model: ir.Model, io: IoSpec) -> None:
        multiples = {dim.name: _common_multiple(dim.low, dim.best, dim.high) for dim in io.dynamic_dims}
        # a size is a multiple of a whole number, so that divisions by what it can be divided by come out even
        self._units = {name: sympy.Symbol(f"{name}_unit", integer=True, positive=True) for name in multiples}
        self._multiples = multiples
        self._values: dict[str, sympy.Expr] = {}
        self._known: dict[str, ir.SymbolicDim | int] = {}
        specs = {spec.name: spec for spec in io.inputs}
        for value in model.graph.inputs:
            spec = specs[value.name or ""]
            for size, dim in zip(value.shape or (), spec.dims, strict=True):
                if not dim.dynamic:
                    continue
                if isinstance(size, int):
                    raise CaptureError(
                        f"{dim.name} of {value.name} became {size} while the model was traced: it cannot be dynamic; "
                        f"give shapes.{dim.name} one number"
                    )
                self._values[str(size.value)] = self._unit(dim.name)
                self._values[dim.name] = self._unit(dim.name)

    def _unit(self, name: str) -> sympy.Expr:
        return self._multiples[name] * self._units[name]

    def of(self, shape: ir.Shape | None) -> ir.Shape | None:
        """The same shape with names."""
        return None if shape is None else ir.Shape([self._dim(dim) for dim in shape])

    def _dim(self, dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or dim.value is None:
            return dim
        text = str(dim.value)
        if text not in self._known:
            self._known[text] = self._simplified(text)
        return self._known[text]

    def _simplified(self, text: str) -> int | ir.SymbolicDim:
        symbols = set(_SYMBOL.findall(text))
        if not symbols <= self._values.keys():
            return ir.SymbolicDim(None)  # made up by shape inference: it says nothing
        expression = sympy.expand(sympy.parse_expr(text, local_dict=dict(self._values)))
        if expression.is_Integer:
            return int(expression)
        sizes = {unit: sympy.Symbol(name) / self._multiples[name] for name, unit in self._units.items()}
        return ir.SymbolicDim(str(sympy.factor(expression.subs(sizes))))


def _common_multiple(*sizes: int) -> int:
    """The largest power of two that divides all sizes."""
    together = 0
    for size in sizes:
        together |= size
    return together & -together
