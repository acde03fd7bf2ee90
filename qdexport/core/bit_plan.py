"""Widths per layer as a file: written by the allocator, readable and editable, and fed back through a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qdexport.core.files import write_text
from qdexport.core.reading import read_text, reading
from qdexport.core.spec import LayerPlan
from qdexport.core.yaml_text import YAML_LIMIT, parse_yaml
from qdexport.errors import RecipeError

__all__ = ["FLOAT_BITS", "BitPlan", "LayerBits", "apply_bit_plan", "check_width"]

FLOAT_BITS = 16  # stands for "in floating point", whatever the body's type
_MIN_BITS, _MAX_BITS = 2, 8


def check_width(bits: int) -> int:
    """Returns a width that a layer can have.

    Raises:
        ValueError: it is neither 2 to 8 nor 16.
    """
    if bits != FLOAT_BITS and not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(
            f"{bits} bits are not possible; use {_MIN_BITS} to {_MAX_BITS}, or {FLOAT_BITS} for floating point"
        )
    return bits


class LayerBits(BaseModel):
    """Widths of one layer; 16 and 16 leave it in floating point."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: int
    activation: int
    why: str = ""

    _width = field_validator("weight", "activation")(check_width)

    @model_validator(mode="after")
    def _both_or_none(self) -> LayerBits:
        if (self.weight == FLOAT_BITS) != (self.activation == FLOAT_BITS):
            raise ValueError(
                f"weight {self.weight} with activation {self.activation}: a layer is in floating point as a whole; "
                f"set both to {FLOAT_BITS}, or neither"
            )
        return self


class BitPlan(BaseModel):
    """The widths of every layer of a model.

    Attributes:
        model: the model's name.
        recipe: the recipe's name.
        objective: what was held within a budget.
        target: where the model will run.
        weight_target: the budget of the weights, in the objective's unit; None when the rules decided.
        activation_target: the same for activations.
        average_weight_bits: per weight, all layers that run counted, those in floating point with 16.
        average_activation_bits: per value of a layer's input; a tensor that several layers share counts once.
        layers: widths by torch module path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    model: str
    recipe: str
    objective: Literal["average_bits", "stored_bytes", "predicted_time"] = "average_bits"
    target: str = ""
    weight_target: float | None = None
    activation_target: float | None = None
    average_weight_bits: float
    average_activation_bits: float
    layers: dict[str, LayerBits] = Field(min_length=1)

    def save(self, path: Path) -> None:
        """Writes YAML atomically, one line per layer."""
        data = self.model_dump(mode="json")
        layers = data.pop("layers")
        head = yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)
        lines = [f"  {_inline(name)}: {_inline(bits)}" for name, bits in layers.items()]
        comment = (
            "# Widths per layer; 16 and 16: in floating point. Edit, and name this file as `bit_plan` in a recipe.\n"
        )
        write_text(path, comment + head + "\n".join(["layers:", *lines]) + "\n")

    @classmethod
    def load(cls, path: Path, plans: Sequence[LayerPlan] | None = None) -> BitPlan:
        """Reads what :meth:`save` wrote, or its edited version.

        Args:
            path: a YAML file.
            plans: of the model that the file is for; given, the names of the layers are checked too.

        Raises:
            RecipeError: no such file, no YAML, a key that is unknown or missing, a width outside 2 to 8 and 16; with
                ``plans`` an unknown layer (with the nearest names) or a missing one.
        """
        data = parse_yaml(read_text(path, RecipeError, limit=YAML_LIMIT), f"bit plan {path}")
        if not isinstance(data, dict):
            raise RecipeError(f"bit plan {path} must hold a mapping with `layers`, not {type(data).__name__}")
        with reading(f"bit plan {path}", RecipeError):
            try:
                plan = cls.model_validate(data)
            except ValidationError as error:
                raise RecipeError(_explain(path, error)) from error
        if plans is not None:
            _check_names(plan, plans, f"bit plan {path}")
        return plan


def apply_bit_plan(plans: Sequence[LayerPlan], plan: BitPlan) -> list[LayerPlan]:
    """Gives layers the widths of a bit plan; everything else about their quantizers stays as the rules say.

    Args:
        plans: what the rules of the recipe decided.
        plan: must name every quantized layer.

    Returns:
        One plan per layer, in the same order; a width of 16 leaves the layer in floating point.

    Raises:
        RecipeError: an unknown or missing layer, a width for a layer that no rule quantizes, or layers that share
            one input tensor with different activation widths.
    """
    _check_names(plan, plans, "bit plan")
    _check_groups(plan, plans)
    changed = []
    for layer in plans:
        bits = plan.layers.get(layer.name)
        if bits is None:
            changed.append(layer)
        elif layer.weight_only and bits.weight != FLOAT_BITS:
            raise RecipeError(
                f"bit plan: the rule of {layer.name} quantizes its weight alone ({layer.why}); leave the layer out "
                "of the plan, or give its rule an activation"
            )
        elif layer.weight is None or layer.activation is None or layer.folded:
            if bits.weight != FLOAT_BITS:
                raise RecipeError(
                    f"bit plan: {layer.name} has {bits.weight} bits, but is not quantized ({layer.why}); "
                    "give it a rule in the recipe, or set weight and activation to 16"
                )
            changed.append(layer)
        elif bits.weight == FLOAT_BITS:
            changed.append(_in_floating_point(layer, bits.why))
        else:
            changed.append(
                replace(
                    layer,
                    weight=layer.weight.model_copy(update={"bits": bits.weight}),
                    activation=layer.activation.model_copy(update={"bits": bits.activation}),
                    why=bits.why or layer.why,
                )
            )
    return changed


def _in_floating_point(layer: LayerPlan, why: str) -> LayerPlan:
    return replace(
        layer,
        weight=None,
        activation=None,
        group="",
        splits=(),
        bos=False,
        channel_scale=False,
        why=why or "bit plan",
    )


def _check_names(plan: BitPlan, plans: Sequence[LayerPlan], source: str) -> None:
    known = [layer.name for layer in plans]
    for name in plan.layers:
        if name not in known:
            raise RecipeError(f"{source}: the model has no layer {name!r}{_near(name, known)}")
    missing = [layer.name for layer in plans if layer.quantized and layer.name not in plan.layers]
    if missing:
        raise RecipeError(
            f"{source}: {len(missing)} quantized layers have no widths: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; add them, or allocate again"
        )


def _check_groups(plan: BitPlan, plans: Sequence[LayerPlan]) -> None:
    first: dict[str, str] = {}
    for layer in plans:
        if not layer.quantized or plan.layers[layer.name].activation == FLOAT_BITS:
            continue
        other = first.setdefault(layer.group, layer.name)
        ours, theirs = plan.layers[layer.name].activation, plan.layers[other].activation
        if ours != theirs:
            raise RecipeError(
                f"bit plan: {other} (activation {theirs}) and {layer.name} (activation {ours}) read one tensor "
                f"({layer.group}) through one quantizer; give them one width, or leave one in floating point"
            )


def _near(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _explain(path: Path, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields = LayerBits.model_fields if where[:1] == ["layers"] else BitPlan.model_fields
            message = f"unknown key{_near(where[-1], list(fields))}"
        lines.append(f"bit plan {path}: {'.'.join(where)}: {message}")
    return "\n".join(lines)
