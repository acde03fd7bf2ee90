"""Number formats of layers: which target takes which, for which kind of layer and GPU, and what to use instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from qdexport.core.precision import LayerKind
from qdexport.core.recipe import Recipe
from qdexport.core.spec import Granularity, LayerPlan, QuantSpec
from qdexport.core.target import TARGETS, Target
from qdexport.errors import RecipeError

__all__ = ["Format", "Support", "capabilities_for", "check_formats", "format_of", "formats_table", "support"]

_INT4_BITS = 4


class Format(StrEnum):
    """Formats of a product: what its operands are."""

    W8A8 = "w8a8"  # weights of 5 to 8 bits, activations of 2 to 8
    W4A8 = "w4a8"  # weights of 2 to 4 bits, activations of 2 to 8
    W8A16 = "w8a16"  # weights alone, 5 to 8 bits, one scale per tensor or output channel
    W8A16_BLOCKED = "w8a16 in blocks"
    W4A16 = "w4a16"  # weights alone, 2 to 4 bits
    W4A16_BLOCKED = "w4a16 in blocks"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a target does with a format.

    Attributes:
        stored: type of the weight in the engine; empty when the format is refused.
        computed: type of the product; ``body`` is that of the rest of the network.
        capability: the oldest compute capability; empty for any.
        refused: why it is refused, and what to use instead.
    """

    stored: str = ""
    computed: str = ""
    capability: str = ""
    refused: str = ""


_BLOCKED_CONV = "weights of convolutions have no blocks; use granularity: per_channel"
_NVFP4_CONV = "NVFP4 is a format of linear layers; use format: fp8, or int with 8 bits"
_NVFP4_TARGET = "NVFP4 is built by target tensorrt-rtx alone; use that target, or format: fp8"
_INT8 = Support(stored="int8", computed="int8")
_NARROW_WEIGHT = Support(stored="int8", computed="body")
_NARROWEST_WEIGHT = Support(stored="int4", computed="body")
_REFERENCE_FP8 = Support(stored="fp8", computed="fp8")
_GPU_FP8 = Support(stored="fp8", computed="fp8", capability="8.9")

_COMMON: dict[tuple[Format, LayerKind], Support] = {
    (Format.W8A8, "conv"): _INT8,
    (Format.W8A8, "linear"): _INT8,
    (Format.W4A8, "conv"): _INT8,
    (Format.W4A8, "linear"): _INT8,
    (Format.W8A16, "conv"): _NARROW_WEIGHT,
    (Format.W8A16, "linear"): _NARROW_WEIGHT,
    (Format.W8A16_BLOCKED, "conv"): Support(refused=_BLOCKED_CONV),
    (Format.W8A16_BLOCKED, "linear"): _NARROW_WEIGHT,
    (Format.W4A16, "conv"): _NARROW_WEIGHT,
    (Format.W4A16, "linear"): _NARROWEST_WEIGHT,
    (Format.W4A16_BLOCKED, "conv"): Support(refused=_BLOCKED_CONV),
    (Format.W4A16_BLOCKED, "linear"): _NARROWEST_WEIGHT,
    (Format.FP8, "conv"): _GPU_FP8,
    (Format.FP8, "linear"): _GPU_FP8,
    (Format.NVFP4, "conv"): Support(refused=_NVFP4_CONV),
    (Format.NVFP4, "linear"): Support(refused=_NVFP4_TARGET),
}

_TENSORRT: dict[tuple[Format, LayerKind], Support] = _COMMON | {
    (Format.W8A16_BLOCKED, "linear"): Support(
        refused="TensorRT documents blocks for 4-bit weights alone; use granularity: per_channel, or bits: 4"
    ),
}

_TABLE: dict[str, dict[tuple[Format, LayerKind], Support]] = {
    "tensorrt-rtx": _COMMON
    | {
        (Format.W4A8, "linear"): Support(stored="int4", computed="int8"),
        (Format.NVFP4, "linear"): Support(stored="nvfp4", computed="nvfp4", capability="12.0"),
    },
    "tensorrt": _TENSORRT,
    "tensorrt-10": _TENSORRT
    | {
        (Format.W4A16, "linear"): _NARROW_WEIGHT,
        (Format.W4A16_BLOCKED, "linear"): Support(
            refused="opset 20 has no blocks; use granularity: per_channel, or target tensorrt"
        ),
    },
    "onnxruntime": _COMMON | {(Format.FP8, "conv"): _REFERENCE_FP8, (Format.FP8, "linear"): _REFERENCE_FP8},
}


def support(target: Target, form: Format, kind: LayerKind) -> Support:
    """One cell of the table."""
    return _TABLE[target.name][form, kind]


def format_of(plan: LayerPlan) -> Format | None:
    """The format of a layer; None when its weight is not quantized."""
    if plan.weight is None or not plan.quantizes_weight:
        return None
    return _format(plan.weight, weight_only=plan.weight_only)


def check_formats(plans: Iterable[LayerPlan], target: Target) -> None:
    """Refuses layers whose format the target does not take.

    Raises:
        RecipeError: names the first layer, and says what to use instead.
    """
    for plan in plans:
        form = format_of(plan)
        if form is None:
            continue
        reason = support(target, form, plan.kind).refused
        if reason:
            raise RecipeError(
                f"layer {plan.name} ({plan.kind}, {plan.why}): target {target.name} does not take {form}: {reason}"
            )


def capabilities_for(recipe: Recipe, target: Target, wanted: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The compute capabilities that can compute with the formats of a recipe's rules.

    Args:
        recipe: capabilities that it names itself are never dropped.
        target: has the table.
        wanted: what the recipe names, or the target's default.

    Returns:
        Those of ``wanted`` that can, and a sentence about the others (empty when there are none).

    Raises:
        RecipeError: the recipe names one that cannot, or none of the default ones can.
    """
    needs = {
        form: support(target, form, kind).capability
        for rule in recipe.rules
        if rule.weight is not None
        for kind in rule.kinds
        for form in (_format(rule.weight, weight_only=rule.weight_only),)
    }
    form, oldest = max(needs.items(), key=lambda item: _version(item[1]), default=(Format.W8A8, ""))
    fitting = tuple(item for item in wanted if _version(item) >= _version(oldest))
    dropped = [item for item in wanted if item not in fitting]
    if not dropped:
        return fitting, ""
    if recipe.compute_capabilities is not None or not fitting:
        raise RecipeError(
            f"compute capability {dropped[0]} has no matrix products in {form}, which needs {oldest} or newer; take it "
            "out of compute_capabilities, or use int with 8 bits"
        )
    without = ", ".join(dropped)
    return fitting, f"{form} needs compute capability {oldest} or newer: the engine is not built for {without}."


def formats_table() -> str:
    """The table as Markdown: ``stored -> computed``, the oldest compute capability, or ``refused``."""
    kinds: tuple[LayerKind, ...] = ("conv", "linear")
    columns = [(name, kind) for name in TARGETS for kind in kinds]
    heads = ["format", *(f"{name}, {kind}" for name, kind in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for form in Format:
        cells = [_cell(support(TARGETS[name], form, kind)) for name, kind in columns]
        lines.append("| " + " | ".join([str(form), *cells]) + " |")
    return "\n".join(lines)


def _cell(item: Support) -> str:
    if item.refused:
        return "refused"
    since = f", {item.capability}+" if item.capability else ""
    return (item.stored if item.stored == item.computed else f"{item.stored}, computed in {item.computed}") + since


def _format(weight: QuantSpec, *, weight_only: bool) -> Format:
    if weight.format != "int":
        return Format(weight.format)
    narrow = weight.bits <= _INT4_BITS
    if not weight_only:
        return Format.W4A8 if narrow else Format.W8A8
    if weight.granularity is Granularity.PER_BLOCK:
        return Format.W4A16_BLOCKED if narrow else Format.W8A16_BLOCKED
    return Format.W4A16 if narrow else Format.W8A16


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".")) if capability else ()
